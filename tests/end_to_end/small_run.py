"""A small run on the committed corpus: data, tokenizer and recipe, and starting it in own processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer
from lclm.data.shards import Sample, ShardWriter, write_manifest

CORPUS = Path(__file__).parent / "corpus"
LAYERS = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
ALL = ("encoder", "adapter", "decoder", "brackets")


def build_data(folder: Path) -> Path:
    """The corpus as data sets, and a tokenizer of bytes, below `folder`."""
    for split in ("train", "heldout"):
        lines = [json.loads(line) for line in (CORPUS / f"{split}.jsonl").read_text().splitlines()]
        for kind, name in (("documents", "text"), ("conversations", "messages")):
            target = str(folder / kind / split)
            with ShardWriter(target, kind=kind) as writer:
                for number, line in enumerate(line for line in lines if name in line):
                    writer.write(Sample(f"{split}-{kind}-{number:03d}", **line))
            write_manifest(target, name=kind, kind=kind, split=split, shards=writer.shards)
    make_tokenizer(TokenizerSettings(kind="bytes"), [], folder / "tokenizer")
    return folder


def recipe(data: Path, run: Path, **stages: dict[str, Any]) -> dict[str, Any]:
    """A recipe of the given stages (AdamW on everything for twelve steps by default) as plain data."""
    sets = ("documents", "conversations")
    return {
        "name": "small",
        "seed": 3,
        "run_dir": str(run),
        "model": {
            "encoder": {"config": LAYERS},
            "decoder": {"config": LAYERS, "tokenizer": str(data / "tokenizer")},
            "ratio": 4,
            "ratios": [4, 8],
            "window": 32,
            "pooling": "mean",
            "encoder_attention": "causal",
            "adapter": "mlp",
            "position_in_block": True,
            "tie_embeddings": True,
        },
        "data": {
            "lanes": 4,
            "micro_batch": 2,
            "workers": 0,
            "run_samples": 4,
            "lookahead": 8,
            "pack": {"positions": 256, "rows": 8, "latents": 80},
            "sources": {name: {"path": str(data / name / "train")} for name in sets},
            "heldout": {name: {"path": str(data / name / "heldout")} for name in sets},
            "tasks": {
                "interleave": {"task": "interleave", "source": "documents", "min_span": 16, "max_span": 64},
                "reconstruct": {"task": "reconstruct", "source": "documents", "min_span": 32, "max_span": 32},
                "chat": {"task": "chat", "source": "conversations"},
            },
            "mixture": {"interleave": 0.5, "reconstruct": 0.25, "chat": 0.25},
        },
        "stages": {"order": list(stages or ["only"]), **(stages or {"only": stage()})},
        "engine": {"zero": 0, "precision": "fp32"},
        "train": {"save_every_steps": 5, "log_every": 1, "validate_every": 6, "validate_batches": 2},
        "probes": {
            "context_tokens": [64],
            "continuation_tokens": 16,
            "reconstruct_tokens": [32],
            "samples": 4,
            "training_samples": 2,
            "texts": 1,
        },
    }


def stage(steps: int = 12, learn: tuple[str, ...] = ALL, **settings: Any) -> dict[str, Any]:
    """A stage in which `learn` learns with AdamW."""
    rates = {name: {"lr": 3e-3, "weight_decay": 0.01} for name in learn}
    return {"learn": rates, "steps": steps, "schedule": {"kind": "linear", "warmup_steps": 3}} | settings


def write(folder: Path, content: dict[str, Any]) -> Path:
    """The recipe as a file."""
    path = folder / f"{Path(content['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(path: Path, processes: int = 1) -> list[str]:
    """The command that trains a recipe."""
    if processes == 1:
        return [sys.executable, "-m", "lclm", "train", str(path)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", "-m", "lclm", "train", str(path)]


def start(path: Path, processes: int = 1) -> subprocess.Popen[str]:
    """Begin to train a recipe in processes of its own, one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.Popen(
        command(path, processes),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(path: Path, processes: int = 1) -> str:
    """Train a recipe to its end; what it printed."""
    process = start(path, processes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-6000:]
    return output


def lines(run_folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The run's metrics of one kind."""
    read = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def losses(run_folder: Path) -> list[float]:
    """Loss of every step."""
    return [line["loss"] for line in lines(run_folder)]


def weights(folder: Path) -> dict[str, Any]:
    """An export's tensors."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
