"""Losses of a small run, kept to be compared with. `python -m tests.end_to_end.golden` makes them anew."""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from lclm.recipe import load_recipe
from lclm.train.trainer import train
from tests.end_to_end import small_run as small

FILE = Path(__file__).with_name("golden.json")
STEPS = 20


def machine() -> dict[str, Any]:
    """What exact equality of losses depends on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        pairs = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in pairs}
        processor = " ".join(fields.get(name, "") for name in ("model name", "cpu family", "model"))
    return {"torch": torch.__version__, "processor": processor, "threads": torch.get_num_threads()}


def run_losses(data: Path, folder: Path) -> dict[str, list[float]]:
    """{stage: loss of every step} of a run of two stages."""
    first, second = small.stage(STEPS), small.stage(STEPS // 2, learn=("encoder", "adapter", "brackets"))
    content = small.recipe(data, folder / "golden", everything=first, without_decoder=second)
    content["train"] |= {"save_every_steps": None, "validate_batches": 0}
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    lines = small.lines(train(load_recipe(small.write(folder, content))))
    order = content["stages"]["order"]
    return {name: [line["loss"] for line in lines if line["stage"] == name] for name in order}


def main() -> None:
    """Write golden.json with one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = run_losses(small.build_data(Path(folder) / "data"), Path(folder))
    FILE.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
