"""Training checkpoints and exports: written whole by all processes together, or not at all."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lclm.checkpoint import (
    CHECKSUMS,
    SCHEMA,
    StageFolder,
    cannot_write,
    checksums,
    damage,
    finish_folder,
    list_files,
    read_json,
    start_folder,
    temporary,
    write_folder,
    write_json,
)
from lclm.train.engine import Engine
from lclm.train.feed import Tally
from lclm.train.processes import Processes

STATE = "state.json"


@dataclass
class State:
    """Where a run stands.

    data: where each lane of data goes on. losses: {task: [nats, loss-bearing tokens]} since the last line.
    """

    step: int = 0
    stage_step: int = 0
    source_tokens: int = 0
    stage_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    metrics_bytes: int = 0
    data: dict[str, Any] | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add(self, tally: Tally) -> None:
        """Count a step."""
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        self.source_tokens += tally.source_tokens
        self.stage_tokens += tally.source_tokens
        self.in_a_row = self.in_a_row + 1 if tally.skipped else 0
        self.skipped += tally.skipped
        if not tally.skipped:
            for task, (total, tokens) in tally.task_losses.items():
                before = self.losses.get(task, [0.0, 0.0])
                self.losses[task] = [before[0] + total, before[1] + tokens]

    def next_stage(self) -> State:
        """The state in which the next stage begins: data cursors carry over, its own counts start at 0."""
        return State(**(asdict(self) | {"stage_step": 0, "stage_tokens": 0, "in_a_row": 0, "losses": {}}))

    @classmethod
    def read(cls, path: Path) -> State:
        """From a JSON file written by this class."""
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {content.get('schema')}, but this version of lclm reads {SCHEMA}; "
                "go on with the version that wrote it"
            )
        return cls(**{item.name: content["state"][item.name] for item in fields(cls)})


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must share with the run that goes on from it."""

    run: str
    frozen: str
    zero: int
    precision: str
    processes: int

    def check(self, path: Path) -> None:
        """Raises ValueError when the checkpoint at `path` is another run's, or of other processes."""
        theirs = read_json(path / STATE)["identity"]
        if theirs["run"] != self.run:
            raise ValueError(f"{path} belongs to another run; remove it, or give this run another run_dir")
        if theirs["frozen"] != self.frozen:
            raise ValueError(
                f"{path}: the frozen weights that this stage starts from are not those it was trained on; "
                "restore the files that `model` names, or the export of the stage before"
            )
        for name in ("zero", "precision"):
            if theirs[name] != getattr(self, name):
                raise ValueError(
                    f"{path} was written with {name} {theirs[name]}, not {getattr(self, name)}; set it back, "
                    "or start a new run with another run_dir"
                )
        if theirs["processes"] != self.processes and self.zero:
            raise ValueError(
                f"{path} was written by {theirs['processes']} processes at ZeRO {self.zero}, which cuts the "
                f"optimizer's state by their number; start that many instead of {self.processes}"
            )


def save_checkpoint(engine: Engine, folder: StageFolder, state: State, identity: Identity, keep: int) -> Path:
    """Write a training checkpoint. Collective. Raises ValueError on all processes when the disk is full."""
    processes = engine.processes
    final = folder.checkpoint(state.stage_step)
    beside = temporary(final)
    _together(processes, final, lambda: start_folder(final) if processes.main else None)
    error = engine.save(beside, {})
    _together(processes, final, lambda: _raise(error))
    sums = processes.gather(checksums(beside, list_files(beside)[processes.rank :: processes.size]))

    def finish() -> None:
        if processes.main:
            content = {"schema": SCHEMA, "state": asdict(state), "identity": asdict(identity)}
            write_json(beside / STATE, content)
            together = {name: value for part in sums for name, value in part.items()}
            together |= checksums(beside, [beside / STATE])
            write_json(beside / CHECKSUMS, {"schema": SCHEMA, "files": together})
            finish_folder(final)
            folder.prune(keep)

    _together(processes, final, finish)
    return final


def _raise(error: str | None) -> None:
    if error:
        raise OSError(error)


def _together(processes: Processes, final: Path, act: Any) -> None:
    """Run `act` on every process; if it fails on any, remove what was written and fail on all."""
    message = None
    try:
        act()
    except (OSError, ValueError) as error:
        message = str(error)
    failed = [text for text in processes.gather(message) if text]
    if failed:
        if processes.main:
            shutil.rmtree(temporary(final), ignore_errors=True)
        raise cannot_write(final, failed[0])


def newest_checkpoint(folder: StageFolder, processes: Processes, say: Any) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones are named. Collective."""
    processes.barrier()
    for path in folder.candidates():
        found = [text for text in processes.gather(damage(path, processes.rank, processes.size)) if text]
        if not found:
            return path
        say(f"checkpoint {path.name} is damaged and is not used: {found[0]}")
    return None


def save_export(final: Path, model: Any, processor: Any) -> None:
    """Write model and processor as a transformers checkpoint in safetensors."""

    def write(folder: Path) -> None:
        try:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:
            if "No space left" in str(error):
                raise OSError(str(error)) from error
            raise

    write_folder(final, write)


def copy_folder(source: Path, final: Path) -> None:
    """Copy a folder so that the copy is whole or absent."""
    write_folder(final, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))


def write_done(folder: StageFolder, state: State) -> None:
    """Mark a stage as complete; its training checkpoints are of no more use."""
    write_json(folder.done, {"schema": SCHEMA, "state": asdict(state)})
    folder.prune(0)


def load_learned(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights that learned into a model built like the one that was trained. In place."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not unexpected and not (set(missing) & learn), "the export's model is not the trained one"
