"""A made-up run with real checkpoints: a tiny model after each of two stages, metrics, probes, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from lclm.model import LCLMForConditionalGeneration, LCLMProcessor
from tests.eval.synthetic import write_recipe, write_run

CHECKPOINT = Path(__file__).parent.parent / "conformance" / "fixtures" / "mean-4x"
STEPS = {"scratch": 400, "adapter": 425}


def make_run(folder: Path, *, recipe: dict[str, Any] | None = None, **saving: Any) -> Path:
    """A run of two complete stages (of five in its recipe), whose decoders differ in one number."""
    write_run(folder, upto=425)
    write_recipe(folder, folder.parent / "data")
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    model = {
        "encoder": {"path": "some-org/Reader-0.1b"},
        "decoder": {"path": None, "config": {"model_type": "qwen3"}},
    }
    written |= {"seed": 7, "run_dir": "/scratch/ada/runs/made-up", "model": model, **(recipe or {})}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    trained = LCLMForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = LCLMProcessor.from_pretrained(CHECKPOINT)
    before = 0
    for number, (stage, step) in enumerate(STEPS.items(), 1):
        export = folder / "stages" / f"{number:02d}-{stage}" / "export"
        with torch.no_grad():
            next(trained.decoder.parameters()).view(-1)[0] += number
        trained.save_pretrained(export, **saving)
        processor.save_pretrained(export)
        state = {"step": step, "stage_step": step - before, "stage_tokens": 5000 * (step - before)}
        (export.parent / "done.json").write_text(json.dumps({"schema": 1, "state": state}))
        before = step
    return folder
