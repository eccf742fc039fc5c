"""A made-up run folder, for tests of the report: five stages, probes that improve, any number of restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

STAGES = {"scratch": 400, "adapter": 25, "encoder": 25, "joint": 25, "sft": 25}
LEARN = {
    "scratch": ("encoder", "adapter", "decoder", "brackets"),
    "adapter": ("adapter", "brackets"),
    "encoder": ("encoder", "adapter", "brackets"),
    "joint": ("encoder", "adapter", "decoder", "brackets"),
    "sft": ("encoder", "adapter", "decoder", "brackets"),
}
AIMS = {"reconstruction": {4: 0.85, 8: 0.75}, "digits": {4: 0.8, 8: 0.65}, "recovered": {4: 0.5, 8: 0.5}}


def near(mean: float, half: float = 0.02) -> dict[str, float]:
    """An interval as the statistics write it."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def probe(skill: float, *, aims: dict | None = None) -> dict[str, Any]:
    """What run_probes returns, for a model that uses its memory to the degree `skill`, 0 to 1."""
    result: dict[str, Any] = {
        "schema": 1, "seed": 0, "ratios": [4, 8], "aims": AIMS if aims is None else aims, "continuation": [],
        "reconstruction": [], "needle": [], "texts": [], "absent": {"needles, several number": "none there"},
    }  # fmt: skip
    for ratio in (4, 8):
        use = skill * (1 if ratio == 4 else 0.9)
        for length in (64, 128):
            loss = {"none": 1.34, "shuffled": 1.342, "compressed": 1.34 - 0.11 * use, "uncompressed": 1.23}
            saved = {way: near(1.34 - value, 0.01) for way, value in loss.items() if way != "none"}
            result["continuation"].append(
                {
                    "ratio": ratio, "context_tokens": length, "next_tokens": 63, "samples": 64,
                    "documents": 60,
                    "loss": {way: near(value, 0.04) for way, value in loss.items()}, "saved": saved,
                    "recovered": {"compressed": near(use, 0.1), "shuffled": near(-0.02, 0.1)},
                    "own": near(0.11 * use, 0.01),
                }
            )  # fmt: skip
        result["reconstruction"].append(
            {
                "ratio": ratio, "context_tokens": 64, "samples": 64, "documents": 60, "gain": near(0.8 * use),
                "accuracy": {"compressed": near(0.15 + 0.82 * use), "shuffled": near(0.15)},
                "exact": near(0.5 * use), "loss": near(0.5),
            }
        )  # fmt: skip
        digits = {
            "compressed": near(0.1 + 0.88 * use),
            "none": near(0.1),
            "uncompressed": near(0.1 + 0.9 * skill),
        }
        result["needle"].append(
            {
                "ratio": ratio, "numbers": "one", "samples": 64, "digits": digits, "exact": digits,
                "gain": near(0.88 * use),
            }
        )  # fmt: skip
        text = "def read(path):\n    '''Read <b>a</b> file | twice.'''\n"
        result["texts"] += [
            {"kind": "reconstruction", "ratio": ratio, "truth": text, "written": text.replace("tw", "thr")},
            {
                "kind": "answer", "ratio": ratio, "truth": "90210", "written": "90218", "context": text,
                "question": "What is the magic number for river?",
            },
        ]  # fmt: skip
    return result


def _train(step: int, stage: str, rng: np.random.Generator) -> dict[str, Any]:
    decay = np.exp(-step / 120)
    tasks = {"interleave": 1.2 + 4 * decay, "reconstruct": 0.1 + 5 * decay, "chat": 0.3 + 4 * decay}
    tasks = {name: float(value * rng.uniform(0.9, 1.1)) for name, value in tasks.items()}
    norms = {name: float(rng.uniform(0.05, 1.5)) for name in LEARN[stage]}
    return {
        "loss": float(np.mean(list(tasks.values()))), "loss_tokens": 2000, "task_loss": tasks,
        "grad_norm": {**norms, "all": float(np.sqrt(sum(n * n for n in norms.values())))},
        "lr": dict.fromkeys(LEARN[stage], (0.003 if stage == "scratch" else 0.0003) * (1 - 0.9 * step / 500)),
        "step_seconds": 0.17, "source_tokens_per_second": float(rng.uniform(2.6e4, 3e4)),
        "positions_per_second": float(rng.uniform(1.1e4, 1.3e4)), "mfu": float(rng.uniform(0.3, 0.4)),
        "waste": {"positions": 0.02, "rows": float(rng.uniform(0.03, 0.08)), "latents": 0.3},
        "time": {"data": 0.01, "model": 0.9, "update": float(rng.uniform(0.04, 0.06)), "other": 0.03},
        "dropped": {"chat: over budget": step},
        "memory_gib": 0.9, "skipped": 0,
    }  # fmt: skip


def write_run(
    folder: Path, *, upto: int = 500, every: int = 2, resumes: tuple[int, ...] = (), probes: bool = True
) -> Path:
    """Write a run folder that has got as far as step `upto`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    step = 0

    def add(kind: str, stage: str, stage_step: int, **figures: Any) -> None:
        head = {"step": step, "stage": stage, "stage_step": stage_step, "kind": kind}
        lines.append({**head, "seconds": 0.17 * step, "source_tokens": 5000 * step, **figures})

    add("event", "scratch", 0, event="start")
    for stage, steps in STAGES.items():
        if step >= upto:
            break
        add("event", stage, 0, event="stage_start")
        for stage_step in range(1, min(steps, upto - step) + 1):
            step += 1
            if step in resumes:
                add("event", stage, stage_step, event="resume")
            if step % every == 0:
                add("train", stage, stage_step, **_train(step, stage, rng))
            if step % 50 == 0:
                validation = {"interleave": 1.3 + 4 * float(np.exp(-step / 120)), "chat": 0.4}
                add("validation", stage, stage_step, loss=1.5, loss_tokens=9000, task_loss=validation)
                if probes:
                    add("probe", stage, stage_step, probes=probe(1 - float(np.exp(-step / 100))))
        else:
            if stage_step == steps:
                add("event", stage, steps, event="stage_end")
    if step == sum(STAGES.values()):
        add("event", "sft", STAGES["sft"], event="done")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_recipe(folder: Path, data: Path) -> None:
    """Add a resolved recipe, provenance and one data set's manifest to a run folder."""
    stages: dict[str, Any] = {"order": list(STAGES)}
    for name, components in LEARN.items():
        stages[name] = {"learn": {component: {"lr": 3e-3} for component in components}, "steps": STAGES[name]}
    recipe = {"name": "made-up", "stages": stages, "data": {"sources": {"documents": {"path": str(data)}}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    requested = {**recipe, "stages": {**stages, "scratch": {**stages["scratch"], "steps": 4000}}}
    (folder / "requested.yaml").write_text(yaml.safe_dump(requested))
    (folder / "provenance.json").write_text(
        json.dumps({"commit": "abc", "diff": "+a\n-b", "versions": {"torch": "2.13.0", "six": "1"}})
    )
    data.mkdir(parents=True, exist_ok=True)
    manifest = {
        "schema": 1, "name": "stdlib", "kind": "documents", "samples": 1234, "text_bytes": 9_000_000,
        "sources": [{"name": "python-stdlib", "licence": "PSF-2.0"}], "fingerprint": "0123456789abcdef",
    }  # fmt: skip
    (data / "manifest.json").write_text(json.dumps(manifest))
