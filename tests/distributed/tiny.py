"""The tiny recipe's model for 20 steps of AdamW, and what a run of it is compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end import small_run as small

STEPS = 20
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


def tiny(data: Path, run: Path, zero: int, **train: Any) -> Path:
    """A recipe file: recipes/tiny.yaml on the tests' corpus, one stage in which everything learns."""
    rates = {name: {"lr": 1e-3, "weight_decay": 0.01} for name in small.ALL}
    content = yaml.safe_load(RECIPE.read_text())
    content |= {"run_dir": str(run), "seed": 3}
    content["model"]["decoder"]["tokenizer"] = str(data / "tokenizer")
    for group, split in (("sources", "train"), ("heldout", "heldout")):
        content["data"][group] = {
            name: {"path": str(data / name / split)} for name in ("documents", "conversations")
        }
    content["stages"] = {
        "order": ["joint"],
        "joint": {"learn": rates, "steps": STEPS, "schedule": {"kind": "linear", "warmup_steps": 3}},
    }
    content["engine"] = {"zero": zero, "precision": "fp32", "timeout_minutes": 5.0}
    content["train"] = {"validate_batches": 0, "save_every_steps": 4, "log_every": 1, **train}
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return small.write(run.parent, content)


def steps_made(run: Path) -> int:
    """Steps that the run's metrics tell of."""
    return len(small.lines(run)) if (run / "metrics.jsonl").exists() else 0


def same_curve(one: Path, other: Path) -> None:
    """The same global batches in both runs; losses as promised for different numbers of processes."""
    first, second = small.lines(one), small.lines(other)
    assert [line["step"] for line in second] == list(range(1, STEPS + 1))
    for name in ("loss_tokens", "source_tokens", "task_tokens"):
        assert [line[name] for line in first] == [line[name] for line in second], name
    assert second[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    assert small.losses(other) == pytest.approx(small.losses(one), rel=1e-5)
