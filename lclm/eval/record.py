"""What a run folder tells: its metrics, stages, recipe, data sets and provenance, whole or partial."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lclm.checkpoint import RunFolder


@dataclass
class StageRecord:
    """One stage as it ran: steps are of the whole run, both ends included."""

    name: str
    first: int
    last: int
    steps: int
    ended: bool
    learns: str = ""
    loss: float | None = None
    seconds: float | None = None


@dataclass
class RunRecord:
    """A run folder, read. `lines` holds metrics by kind in order of steps; `absent` says what is missing."""

    folder: Path
    lines: dict[str, list[dict]]
    damaged: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    requested: dict[str, Any] = field(default_factory=dict)  # the recipe before step counts were fitted
    provenance: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def events(self, name: str) -> list[dict]:
        """The event lines of one name."""
        return [line for line in self.lines.get("event", []) if line.get("event") == name]

    @property
    def finished(self) -> bool:
        """Whether the last stage came to its end."""
        return bool(self.events("done"))

    @property
    def last(self) -> dict:
        """The last line of any kind; {} when there is none."""
        return max(
            (line for kind in self.lines.values() for line in kind), key=lambda x: x["step"], default={}
        )

    @property
    def probes(self) -> list[tuple[int, dict]]:
        """(step, result of run_probes) in order."""
        return [(line["step"], line["probes"]) for line in self.lines.get("probe", []) if line.get("probes")]

    def series(self, kind: str, *path: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the figure at `path` in the lines of `kind`; lines without it are left out."""
        steps, values = [], []
        for line in self.lines.get(kind, []):
            value: Any = line
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, (int, float)) and np.isfinite(value):
                steps.append(line["step"])
                values.append(value)
        return np.asarray(steps, float), np.asarray(values, float)

    def names(self, kind: str, path: str) -> list[str]:
        """The keys that the figure `path` (a dict) ever has, in order of appearance."""
        return list(dict.fromkeys(key for line in self.lines.get(kind, []) for key in line.get(path) or {}))

    def stages(self) -> list[StageRecord]:
        """The stages that have run or begun, in order."""
        found: dict[str, StageRecord] = {}
        for kind in ("event", "train", "validation", "probe"):
            for line in self.lines.get(kind, []):
                name = line.get("stage")
                if not name:
                    continue
                first = line["step"] - line.get("stage_step", 0) + 1
                stage = found.setdefault(name, StageRecord(name, first, line["step"], 0, False))
                stage.last = max(stage.last, line["step"])
                stage.steps = max(stage.steps, line.get("stage_step", 0))
                if line.get("event") == "stage_end":
                    stage.ended = True
        ordered = sorted(found.values(), key=lambda stage: (stage.first, stage.last))
        before = 0.0
        for stage in ordered:
            self._fill(stage, before)
            before += stage.seconds or 0.0
        return ordered

    def _fill(self, stage: StageRecord, before: float) -> None:
        lines = [line for kind in self.lines.values() for line in kind if line.get("stage") == stage.name]
        seconds = [line["seconds"] for line in lines if isinstance(line.get("seconds"), (int, float))]
        stage.seconds = max(seconds) - before if seconds else None
        losses = [
            x["loss"] for x in self.lines.get("train", []) if x.get("stage") == stage.name and "loss" in x
        ]
        stage.loss = float(np.mean(losses[-10:])) if losses else None
        learn = ((self.recipe.get("stages") or {}).get(stage.name) or {}).get("learn") or {}
        stage.learns = ", ".join(f"{name} {_rate(settings)}".strip() for name, settings in learn.items())


def _rate(settings: Any) -> str:
    if not isinstance(settings, dict) or not isinstance(settings.get("lr"), (int, float)):
        return ""
    muon = settings.get("muon") or {}
    words = f" (Muon {muon['lr']:g})" if isinstance(muon.get("lr"), (int, float)) else ""
    return f"{settings['lr']:g}{words}{' LoRA' if settings.get('lora') else ''}"


def read_run(folder: str | Path, *, local: bool = False) -> RunRecord:
    """Read a run folder; only a folder without metrics is an error (ValueError).

    local: leave out data sets that lie behind a URL.
    """
    folder = Path(folder)
    run = RunFolder(folder)
    path = run.metrics
    if not path.is_file():
        raise ValueError(
            f"{folder} is no run folder: it has no {path.name}; give the `run_dir` of a recipe that has run"
        )
    lines, damaged = _read_lines(path)
    record = RunRecord(folder, lines, damaged)
    record.recipe = _read_yaml(run.recipe)
    record.requested = _read_yaml(run.requested)
    record.provenance = _read_json(run.provenance)
    record.datasets = _read_datasets(record.recipe, local)
    for what, there in {
        "training metrics": lines.get("train"),
        "validation losses": lines.get("validation"),
        "probes": record.probes,
        "the resolved recipe (recipe.yaml)": record.recipe,
        "provenance": record.provenance,
        "data manifests (their folders are not reachable from here)": record.datasets,
    }.items():
        if not there:
            record.absent.append(what)
    return record


def _read_lines(path: Path) -> tuple[dict[str, list[dict]], int]:
    """Lines by kind, one per step (the newest wins) but for events; and how many could not be read."""
    kinds: dict[str, dict[Any, dict]] = {}
    damaged = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                kind, step = line["kind"], int(line["step"])
            except (ValueError, KeyError, TypeError):
                damaged += 1
                continue
            key = (step, number) if kind == "event" else step
            kinds.setdefault(kind, {})[key] = line
    return {kind: [lines[key] for key in sorted(lines)] for kind, lines in kinds.items()}, damaged


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _read_datasets(recipe: dict[str, Any], local: bool) -> list[dict[str, Any]]:
    """The manifests of the data sets that the recipe names, each with its `use` and `path`."""
    import fsspec

    data = recipe.get("data") or {}
    found = []
    for use, key in (("training", "sources"), ("held out", "heldout")):
        for name, source in (data.get(key) or {}).items():
            url = source.get("path") if isinstance(source, dict) else source
            if not url or (local and "://" in str(url)):
                continue
            try:
                with fsspec.open(f"{str(url).rstrip('/')}/manifest.json", "rb") as file:
                    manifest = json.loads(file.read())
            except (OSError, ValueError, ImportError):
                continue
            found.append({**manifest, "use": use, "path": url, "source": name})
    return found
