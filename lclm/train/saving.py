"""Training checkpoints and exports: written whole by all processes together, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lclm.checkpoint import (
    SCHEMA,
    STATE,
    StageFolder,
    cannot_write,
    changed,
    checksums,
    damage,
    finish_checkpoint,
    list_files,
    read_json,
    set_aside,
    start_folder,
    sync,
    temporary,
    write_folder,
    write_json,
)
from lclm.train.engine import Engine
from lclm.train.feed import Tally
from lclm.train.processes import Processes


@dataclass
class State:
    """Where a run stands.

    data: where each lane of data goes on. losses: {task: [nats, loss-bearing tokens]} since the last line.
    spikes, rewinds: see lclm.train.spikes; of this stage.
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
    spikes: dict[str, list[list[float]]] = field(default_factory=dict)
    rewinds: int = 0

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
        own = {"stage_step": 0, "stage_tokens": 0, "in_a_row": 0, "losses": {}, "spikes": {}, "rewinds": 0}
        return State(**(asdict(self) | own))

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

    def check(self, path: Path) -> bool:
        """Whether the checkpoint at `path` must be cut anew (see lclm.train.elastic) to go on here.

        Raises ValueError when it is another run's, or cannot go on here.
        """
        theirs = read_json(path / STATE)["identity"]
        if theirs["run"] != self.run:
            raise ValueError(f"{path} belongs to another run; remove it, or give this run another run_dir")
        if theirs["frozen"] != self.frozen:
            raise ValueError(
                f"{path}: the frozen weights that this stage starts from are not those it was trained on; "
                "restore the files that `model` names, or the export of the stage before"
            )
        if theirs["precision"] != self.precision:
            raise ValueError(
                f"{path} was written with precision {theirs['precision']}, not {self.precision}; "
                "set it back, or start a new run with another run_dir"
            )
        if bool(theirs["zero"]) != bool(self.zero):
            raise ValueError(
                f"{path} was written at ZeRO {theirs['zero']}, not {self.zero}. A run may change among ZeRO "
                "1 to 3, but not between 0 and them; set it back, or start a new run with another run_dir"
            )
        return bool(self.zero) and (theirs["zero"], theirs["processes"]) != (self.zero, self.processes)


def save_checkpoint(engine: Engine, folder: StageFolder, state: State, identity: Identity, keep: int) -> Path:
    """Write a training checkpoint. Collective. Raises ValueError on all processes when the disk is full."""
    processes = engine.processes
    final = folder.checkpoint(state.stage_step)
    beside = temporary(final)
    _together(processes, final, lambda: start_folder(final) if processes.main else None)
    error = engine.save(beside, {})
    _together(processes, final, lambda: _raise(error))
    sums: dict[str, Any] = {}

    def add_up() -> None:
        own = list_files(beside)[processes.rank :: processes.size]
        for path in own:
            sync(path)
        sums.update(checksums(beside, own))

    _together(processes, final, add_up)
    parts = processes.gather(sums)

    def finish() -> None:
        if processes.main:
            content = {"schema": SCHEMA, "state": asdict(state), "identity": asdict(identity)}
            finish_checkpoint(final, content, {name: value for part in parts for name, value in part.items()})

    _together(processes, final, finish)
    if processes.main:
        with contextlib.suppress(OSError):
            folder.prune(keep)
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
        remove_attempt(processes, final)
        raise cannot_write(final, failed[0])


def remove_attempt(processes: Processes, final: Path) -> None:
    """Remove what was written of a checkpoint that failed. Collective: no process still writes to it."""
    processes.barrier()
    if processes.main:
        shutil.rmtree(temporary(final), ignore_errors=True)


def newest_checkpoint(folder: StageFolder, processes: Processes, say: Any) -> Path | None:
    """The newest checkpoint whose files are what was written. Collective.

    Damaged ones are named and set aside: they lose their name, and go with the next checkpoint's `prune`.
    """
    names = processes.gather([path.name for path in folder.candidates()] if processes.main else None)[0]
    damaged, newest = [], None
    for name in names:
        path = folder.checkpoints / name
        found = [text for text in processes.gather(damage(path, processes.rank, processes.size)) if text]
        if not found:
            newest = path
            break
        damaged.append(path)
        say(f"checkpoint {path.name} is damaged and is not used: {found[0]}")
    if damaged:
        stage = folder.path.name
        if newest:
            say(f"stage {stage} goes on from {newest.name}")
        else:
            say(f"no checkpoint of stage {stage} is whole: the stage begins anew, and its steps are lost")
        if processes.main:
            for path in damaged:
                set_aside(path)
    processes.barrier()
    return newest


def save_export(final: Path, model: Any, processor: Any) -> None:
    """Write model and processor as a transformers checkpoint in safetensors."""

    def write(folder: Path) -> None:
        try:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        except SafetensorError as error:  # what it makes of an OSError
            raise OSError(str(error)) from error

    write_folder(final, write)


def copy_export(stage: StageFolder, final: Path, processes: Processes) -> None:
    """Make the last stage's export the run's, whole or absent, or check the one that is there. Collective."""
    processes.barrier()
    error = None
    with processes.alone("export"):
        if processes.main and not final.is_dir():
            try:
                write_folder(final, lambda folder: shutil.copytree(stage.export, folder, dirs_exist_ok=True))
            except ValueError as problem:
                error = str(problem)
    processes.agree(error)
    check_export(stage, final, processes)


def write_done(folder: StageFolder, state: State) -> None:
    """Mark a stage as complete, with its export's checksums; its training checkpoints are of no more use."""
    files = checksums(folder.export, list_files(folder.export))
    content = {"state": asdict(state), "export": files}
    write_json(folder.done, {"schema": SCHEMA, **content, "sha256": _digest(content)})
    with contextlib.suppress(OSError):
        folder.prune(0)


def _digest(content: Any) -> str:
    """SHA-256 of plain data, as it is after it was written as JSON and read again."""
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def read_done(folder: StageFolder) -> State:
    """The state that a complete stage ended with. ValueError, with what to do, when its file is damaged."""
    try:
        content = read_json(folder.done)
        ours = {name: content[name] for name in ("state", "export") if name in content}
        # runs of older versions list no export
        if ours.keys() != {"state"} and content["sha256"] != _digest(ours):
            raise ValueError("its content is not what was written")
        return State.read(folder.done)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.done}, which says how a complete stage ended, cannot be used ({error}). Put it back "
            f"from a copy, or remove {folder.path} and the stages after it: they are trained again"
        ) from None


def check_export(folder: StageFolder, export: Path, processes: Processes) -> None:
    """Compare `export` with what the stage wrote. Collective; ValueError, with what to do, if damaged."""
    try:
        expected = read_json(folder.done).get("export", {})
        found = changed(export, expected, processes.rank, processes.size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"{folder.done} is damaged ({type(error).__name__}: {error})"
    if export == folder.export:
        remedy = f"remove {folder.path} and the stages after it: they are trained again"
    else:
        remedy = f"remove {export}: it is copied again from {folder.export}"
    processes.agree(
        found and f"the export of a complete stage is damaged: {found}. Put it back from a copy, or {remedy}"
    )


def load_learned(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights that learned into a model built like the one that was trained. In place."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not unexpected and not (set(missing) & learn), "the export's model is not the trained one"
