"""A model whose weights fill several hundred MB, and what converting it takes in memory.

usage: peak.py SOURCE OUTPUT LAYOUT SHARD. SOURCE: a checkpoint, or a run, whose newest one is taken. Prints
{"before", "after"}: the most bytes this process had in memory until it opened SOURCE, and until the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lclm.checkpoint import RunFolder
from lclm.hub.export import export_run
from lclm.model import LCLMForConditionalGeneration, LCLMProcessor
from lclm.recipe import Recipe
from lclm.stored import StoredModel
from lclm.train.engine import import_deepspeed
from lclm.train.weights import open_checkpoint

CHECKPOINT = Path(__file__).parent.parent / "conformance" / "fixtures" / "mean-4x"
LARGER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "layer_types": None}


def large_model() -> Any:
    """The conformance fixture's model with 12 layers of width 512 in either part, without values."""
    config = LCLMForConditionalGeneration.read_config(CHECKPOINT)
    parts = [
        type(part)(**{**part.to_dict(), **LARGER}) for part in (config.encoder_config, config.decoder_config)
    ]
    settings = {**config.to_dict(), "encoder_config": parts[0], "decoder_config": parts[1]}
    with torch.device("meta"):
        return LCLMForConditionalGeneration(type(config)(**{**settings, "adapter_hidden": 512}))


def write_large(folder: Path) -> None:
    """Write it with weights that all differ."""
    model = large_model()
    shapes = {name: value.shape for name, value in model.state_dict().items()}

    def read(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name) + sum(name.encode()))
        return torch.rand(shapes[name].numel(), generator=generator).reshape(shapes[name])

    stored = StoredModel(model, LCLMProcessor.from_pretrained(CHECKPOINT), read)
    export_run(folder, folder, shard_size="64MB", weights=stored)


def most_in_memory() -> int:
    """Bytes this process had in memory at most. (What getrusage says counts what started it, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(source: Path, output: Path, layout: str, shard: int) -> int:
    """Bytes of memory that an export took in a process of its own, beyond what its imports did."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hub.peak", str(source), str(output), layout, f"{shard // 1000}KB"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    assert size > 12 * shard
    grown: int = found["after"] - found["before"]
    print(f"{size / 2**20:,.0f} MiB of weights: {grown / 2**20:,.0f} MiB with files of {shard / 2**20:,.0f}")
    return grown


def main() -> None:
    """What the module's text says."""
    source, output, layout, shard = sys.argv[1:]
    export_run(CHECKPOINT, Path(output + ".first"), shard_size="1MB")  # imports all that it needs
    run, training = RunFolder(Path(source)), RunFolder(Path(source)).recipe.is_file()
    if training:
        import_deepspeed()
    before = most_in_memory()
    weights = open_checkpoint(Recipe.read(run.recipe), run) if training else None
    export_run(run.path, Path(output), layout=layout, shard_size=shard, weights=weights)
    print(json.dumps({"before": before, "after": most_in_memory()}))


if __name__ == "__main__":
    main()
