"""Predicted and measured memory of training steps, for several ZeRO stages, precisions and choices.

Each case trains a model with random weights in processes of its own, on the largest batch that its budgets
allow, and compares the resident memory that its steps add with what `lclm plan` predicts for a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

MIB = 2**20
LAYERS = {
    "model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}  # fmt: skip
SIZES = {"small": (256, 2, 384, 4, 8192, 384), "middle": (384, 6, 640, 8, 16384, 768)}
"""Encoder width and layers, decoder width and layers, vocabulary, decoder positions."""
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "all learn": {},
    "all learn, checkpointing": {"checkpointing": True},
    "decoder frozen": {"frozen": True},
    "decoder frozen, checkpointing": {"frozen": True, "checkpointing": True},
    "two micro-batches": {"accumulation": 2},
    "bf16": {"bf16": True},
    "bf16, checkpointing": {"bf16": True, "checkpointing": True},
    "ZeRO 1": {"zero": 1, "processes": 2},
    "ZeRO 2": {"zero": 2, "processes": 2},
    "ZeRO 3": {"zero": 3, "processes": 2},
    "ZeRO 1, bf16": {"zero": 1, "processes": 2, "bf16": True},
    "ZeRO 2, bf16": {"zero": 2, "processes": 2, "bf16": True},
    "ZeRO 3, bf16": {"zero": 3, "processes": 2, "bf16": True},
    "ZeRO 2, bf16, decoder frozen": {"zero": 2, "processes": 2, "bf16": True, "frozen": True},
    "ZeRO 3, decoder frozen, checkpointing": {
        "zero": 3, "processes": 2, "frozen": True, "checkpointing": True,
    },
}  # fmt: skip


def recipe(
    size: str, tokenizer: Path, *, zero: int = 0, bf16: bool = False, frozen: bool = False,
    checkpointing: bool = False, processes: int = 1, accumulation: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """A recipe of one stage, as plain data."""
    encoder, encoder_layers, decoder, decoder_layers, vocabulary, positions = SIZES[size]

    def part(width: int, layers: int) -> dict[str, Any]:
        return LAYERS | {
            "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width,
            "vocab_size": vocabulary,
        }  # fmt: skip

    learn = ["encoder", "adapter", "brackets"] + ["decoder"] * (not frozen)
    return {
        "name": "memory",
        "model": {
            "encoder": {"config": part(encoder, encoder_layers), "tokenizer": str(tokenizer)},
            "decoder": {"config": part(decoder, decoder_layers), "tokenizer": str(tokenizer)},
            "ratio": 8, "window": 128, "pooling": "mean", "encoder_attention": "causal", "adapter": "mlp",
        },
        "data": {
            "lanes": processes * accumulation, "micro_batch": 1,
            "pack": {"positions": positions, "rows": positions // 128, "latents": positions // 8},
            "sources": {"documents": {"path": "nowhere"}},
            "tasks": {"interleave": {"task": "interleave", "source": "documents"}},
            "mixture": {"interleave": 1.0},
        },
        "stages": {"only": {"learn": {name: {"lr": 1e-5} for name in learn}, "steps": STEPS}},
        "engine": {
            "zero": zero, "precision": "bf16" if bf16 else "fp32", "bucket_elements": 2_000_000,
            "activation_checkpointing": {"encoder": checkpointing, "decoder": checkpointing},
        },
    }  # fmt: skip


def predict(path: Path, processes: int) -> dict[str, float]:
    """{part: bytes} by the plan."""
    from lclm.recipe import load_recipe
    from lclm.train.planning.hardware import MACHINES
    from lclm.train.planning.plan import Cluster, Planner

    cluster = Cluster(MACHINES["cpu"], nodes=1, per_node=processes)
    return dict(Planner(load_recipe(path), cluster).memory("only").parts)


def measure(path: Path, processes: int) -> float:
    """Bytes that the steps add at most to a process's resident memory, the largest of all processes."""
    command = [sys.executable, __file__, "--child", str(path)]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={processes}", *command[1:]]
    environment = os.environ | {
        # glibc gives what is freed back to the system at once, so that resident memory is what is held
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    peaks = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak-bytes ")]
    if done.returncode or len(peaks) != processes:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return max(peaks)


def child(path: Path) -> None:
    """One process: steps of a tiny model, so that all is loaded, then those in question."""
    from lclm.recipe import load_recipe
    from lclm.train.processes import leave_processes, start_processes

    loaded = load_recipe(path)
    processes = start_processes(loaded.engine)
    small = load_recipe(path)
    for part in (small.model.encoder, small.model.decoder):
        part.config |= {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    train(small, processes)
    before = resident("VmRSS")
    train(loaded, processes)
    print(f"peak-bytes {resident('VmHWM') - before}", flush=True)
    leave_processes()


def train(loaded: Any, processes: Any) -> None:
    """A few steps on the largest batch; the high-water mark is set back after the first."""
    from lclm.train.planning.largest import largest_batch
    from lclm.train.stages import build_engine

    engine, _ = build_engine(loaded, loaded.stages["only"], None, processes)
    batch = largest_batch(engine.model.config, loaded.data.pack, loaded.data.micro_batch, processes.device)
    for step in range(STEPS):
        for _ in range(loaded.data.accumulation(processes.size)):
            output = engine.deepspeed(**batch)
            engine.deepspeed.backward(output.loss)
            del output
            engine.deepspeed.step()
        gc.collect()
        if step == 0:
            Path("/proc/self/clear_refs").write_text("5")
    engine.close()
    del engine
    gc.collect()


def resident(name: str) -> int:
    """Bytes: VmRSS, or its high-water mark VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def compare(size: str, name: str, folder: Path) -> dict[str, Any]:
    """One case: predicted parts, predicted and measured peak."""
    from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer

    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        make_tokenizer(TokenizerSettings(kind="bytes"), [], tokenizer)
    options = CASES[name]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(size, tokenizer, **options)))
    parts = predict(path, options.get("processes", 1))
    predicted, measured = sum(parts.values()), measure(path, options.get("processes", 1))
    return {
        "case": name, "predicted MiB": predicted / MIB, "measured MiB": measured / MIB,
        "predicted / measured": predicted / measured,
        "parts": {part: value / MIB for part, value in parts.items()},
    }  # fmt: skip


def notes(size: str) -> list[str]:
    """What the table says of itself."""
    encoder, encoder_layers, decoder, decoder_layers, vocabulary, positions = SIZES[size]
    return [
        f"Encoder {encoder_layers} layers of {encoder}, decoder {decoder_layers} layers of {decoder}, "
        f"{vocabulary:,} embeddings, one pack of {positions} positions, all of it used and with loss.",
        "Measured: the most resident memory of a process in steps 2 to 3, less that after a step of a model "
        "of one layer in the same process (interpreter and libraries). The larger of the processes.",
        "Predicted: `lclm.train.planning.plan` for a CPU, from the recipe alone. Parts are in the JSON file. "
        "What the engine keeps at ZeRO 0, 1 in bf16, 2 was put right after these cases were first measured.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--name", default="memory", help="name of the result files")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    import torch
    from common import save

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            rows.append(compare(options.size, name, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    save(options.name, torch.device("cpu"), rows, notes(options.size))


if __name__ == "__main__":
    main()
