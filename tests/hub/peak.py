"""A model whose weights fill several hundred MB, and what converting it takes in memory.

usage: peak.py SOURCE OUTPUT LAYOUT DTYPE SHARD. Prints {"before", "after"}: the most bytes that this process
had in memory until it opened SOURCE, and until it had written OUTPUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lclm.hub.export import export_run
from lclm.model import LCLMForConditionalGeneration, LCLMProcessor
from lclm.stored import StoredModel

CHECKPOINT = Path(__file__).parent.parent / "conformance" / "fixtures" / "mean-4x"
LARGER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "layer_types": None}


def large_model() -> Any:
    """The conformance fixture's model with 16 layers of width 512 in either part, without values."""
    config = LCLMForConditionalGeneration.read_config(CHECKPOINT)
    parts = [
        type(part)(**{**part.to_dict(), **LARGER}) for part in (config.encoder_config, config.decoder_config)
    ]
    settings = {**config.to_dict(), "encoder_config": parts[0], "decoder_config": parts[1]}
    with torch.device("meta"):
        return LCLMForConditionalGeneration(type(config)(**{**settings, "adapter_hidden": 512}))


def write_large(folder: Path) -> int:
    """Write it with weights that all differ; their bytes."""
    model = large_model()
    shapes = {name: value.shape for name, value in model.state_dict().items()}

    def read(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name) + sum(name.encode()))
        return torch.rand(shapes[name].numel(), generator=generator).reshape(shapes[name])

    stored = StoredModel(model, LCLMProcessor.from_pretrained(CHECKPOINT), read)
    export_run(folder, folder, shard_size="64MB", weights=stored)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def most_in_memory() -> int:
    """Bytes this process had in memory at most. (What getrusage says counts what started it, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """What the module's text says."""
    source, output, layout, dtype, shard = sys.argv[1:]
    export_run(
        CHECKPOINT, Path(output + ".first"), layout="native", shard_size="1MB"
    )  # imports what it needs
    before = most_in_memory()
    export_run(Path(source), Path(output), layout=layout, dtype=dtype, shard_size=shard)
    print(json.dumps({"before": before, "after": most_in_memory()}))


if __name__ == "__main__":
    main()
