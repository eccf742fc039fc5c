"""How a stage's checkpoints are written, in the background or at once, and what happens when one is not."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lclm.checkpoint import SCHEMA, StageFolder, cannot_write, discard, start_folder
from lclm.train.ends import Requeue
from lclm.train.engine import Engine
from lclm.train.flush import Order, Writer
from lclm.train.saving import Identity, State, remove_attempt, save_checkpoint
from lclm.train.settings import TrainSettings
from lclm.train.snapshot import SnapshotFolder, room

TURN = 0.2
"""Seconds between the processes' words to one another while they wait for a checkpoint."""
SAID_SECONDS = 1.0
"""A longer wait for the disk is said."""
PARTING_SECONDS = 60.0
"""How long a run that ends by an error waits for the checkpoint that is being written."""


class Saver:
    """Writes one stage's checkpoints. Every process has one; all but `failed` and closing is collective.

    In the background (`train.save: async`) a save is a snapshot into memory, of one step and of every
    process; a process beside this one writes it to the disk while training goes on. One at a time.
    """

    def __init__(
        self,
        engine: Engine,
        folder: StageFolder,
        identity: Identity,
        settings: TrainSettings,
        minutes: float,
        event: Callable[..., None],
        say: Callable[[str], None],
    ) -> None:
        """`minutes`: waits for the disk end before so many. `event(name, **figures)` hears what happened."""
        self._engine, self._processes = engine, engine.processes
        self._folder, self._identity, self._settings = folder, identity, settings
        self._seconds, self._event, self._say = minutes * 30, event, say
        self._writer = Writer()
        self._memory: SnapshotFolder | None = None
        self._answer: dict[str, Any] | None = None
        self._pending: State | None = None
        self._began = self._cost = 0.0
        self._whole = -1
        self._reason: str | None = None
        self.failed_in_a_row = 0

    def __enter__(self) -> Saver:
        """Not collective. What `train.keep` no longer keeps makes room for the next checkpoint."""
        if self._processes.main:
            with contextlib.suppress(OSError):
                for path in self._folder.candidates()[self._settings.keep :]:
                    discard(path)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Not collective. A checkpoint that is being written is waited for where all processes end alike."""
        together = kind is not None and issubclass(kind, (ValueError, Requeue))
        if together and self._answer is None and self._writer.busy:
            self._writer.look(min(PARTING_SECONDS, self._seconds))
        self._writer.end()
        if self._memory is not None:
            self._memory.close()

    @property
    def failed(self) -> bool:
        """Whether this process knows that the checkpoint being written will not be whole. Costs no time."""
        self._look()
        return self._answer is not None and self._answer["error"] is not None

    def save(self, state: State, *, now: bool = False) -> None:
        """Write a checkpoint of `state`; `now`: return when it is on the disk, and fail if it is not.

        One that cannot be written is said and counted, and the run goes on. Raises ValueError, on all
        processes, with `now` or when `train.max_failed_saves` in a row could not.
        """
        self.settle()
        if self._whole == state.stage_step:
            return
        self._began = time.monotonic()
        try:
            if now or not self._in_background(state):
                save_checkpoint(self._engine, self._folder, state, self._identity, self._settings.keep)
                self._cost = time.monotonic() - self._began
                self._whole, self.failed_in_a_row = state.stage_step, 0
                self._tell(state.stage_step, "sync")
        except ValueError as error:
            self._failed(state.stage_step, str(error), fatal=now)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written. Bounded; ValueError as `save` raises it."""
        if self._pending is None:
            return
        state, final = self._pending, self._folder.checkpoint(self._pending.stage_step)
        began, waited, error = time.monotonic(), 0.0, None
        while True:
            self._processes.at("waiting for a checkpoint")
            self._look(TURN if waited else 0.0)
            own = "writing" if self._answer is None else self._answer["error"]
            answers = self._processes.gather(own)
            waited = time.monotonic() - began
            if all(answer is None for answer in answers):
                break
            wrong = [answer for answer in answers if answer not in (None, "writing")]
            late = self._processes.gather(waited > self._seconds)[0]
            if wrong or late:
                error = wrong[0] if wrong else f"not on the disk after {waited:,.0f} seconds of waiting"
                break
        if error is None:
            self._pending = self._answer = None
            self._whole, self.failed_in_a_row = state.stage_step, 0
            if waited > SAID_SECONDS:
                self._event("save_waited", of_step=state.stage_step, seconds=round(waited, 3))
                self._say(f"waited {waited:,.1f} s for {final.name} to be on the disk")
            return
        self._writer.end()
        self._pending = self._answer = None
        if self._memory is not None:
            self._memory.clear()
        remove_attempt(self._processes, final)
        self._failed(state.stage_step, str(cannot_write(final, error)), fatal=False)

    def after_step(self, failed: bool) -> None:
        """`failed`: whether any process's `failed` was true, as the step's tally knows."""
        if failed:
            self.settle()

    def _look(self, seconds: float = 0.0) -> None:
        if self._pending is not None and self._answer is None:
            self._answer = self._writer.look(seconds)
            if self._answer is not None and self._answer["error"] is None:
                self._tell(self._pending.stage_step, "async", write_seconds=round(self._answer["seconds"], 3))

    def _in_background(self, state: State) -> bool:
        """Take the snapshot and let it be written; False where it must be written at once."""
        if self._settings.save == "sync":
            return False
        processes, final = self._processes, self._folder.checkpoint(state.stage_step)
        error = why = None
        try:
            why = self._no_room()
            if processes.main:
                start_folder(final)
        except OSError as problem:
            error = str(problem)
        answers = processes.gather((error, why))
        self._raise(final, [error for error, _ in answers])
        if reasons := [why for _, why in answers if why]:
            return self._at_once(reasons[0])
        assert self._memory is not None
        source = self._memory.begin()
        error = self._engine.save(source, {})
        if reasons := [text for text in processes.gather(error) if text]:
            self._memory.clear()
            return self._at_once(f"the snapshot in memory failed ({reasons[0]})")
        content = {"schema": SCHEMA, "state": asdict(state), "identity": asdict(self._identity)}
        order = Order(
            str(source), str(final), processes.rank, processes.size, str(self._folder.path),
            self._settings.keep, content if processes.main else None,
        )  # fmt: skip
        self._pending, self._answer = State(**asdict(state)), None
        self._cost = time.monotonic() - self._began
        try:
            self._writer.send(order)
        except OSError as problem:
            self._answer = {"error": f"no process to write checkpoints: {problem}", "seconds": 0.0}
        return True

    def _no_room(self) -> str | None:
        """Why there is no room in memory for this process's snapshot, None if there is."""
        parent = Path(self._settings.snapshot_folder)
        if not parent.is_dir():
            return f"there is no folder {parent}"
        if self._memory is None:
            try:
                self._memory = SnapshotFolder(parent)
            except OSError as problem:
                return str(problem)
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        need, free = self._engine.state_bytes() * beside, room(parent)
        if need > free:
            return f"snapshots need {need / 2**20:,.0f} MiB and {parent} can spare {free / 2**20:,.0f}"
        return None

    def _at_once(self, reason: str) -> bool:
        if reason != self._reason:
            self._say(f"checkpoints are not written in the background: {reason}")
            self._event("save_in_foreground", reason=reason)
        self._reason = reason
        return False

    def _raise(self, final: Path, errors: list[str | None]) -> None:
        found = [error for error in errors if error]
        if found:
            remove_attempt(self._processes, final)
            raise cannot_write(final, found[0])

    def _tell(self, step: int, how: str, **figures: Any) -> None:
        """A checkpoint is on the disk. (Only the main process writes events; its writer ends checkpoints.)"""
        self._event("checkpoint", of_step=step, save=how, waited_seconds=round(self._cost, 3), **figures)

    def _failed(self, step: int, message: str, *, fatal: bool) -> None:
        self.failed_in_a_row += 1
        in_a_row, most = self.failed_in_a_row, self._settings.max_failed_saves
        self._event("save_failed", of_step=step, message=message, in_a_row=in_a_row)
        self._say(
            f"CHECKPOINT NOT WRITTEN (step {step:,} of the stage; {in_a_row} in a row, {most} end the run): "
            f"{message}"
        )
        if not fatal and in_a_row < most:
            return
        newest = next((path.name for path in self._folder.candidates()), None)
        stands = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint of this stage"
        what = "the last checkpoint" if fatal else f"{in_a_row} checkpoints in a row (train.max_failed_saves)"
        raise ValueError(
            f"{what} could not be written, and {stands}: what was trained since then is lost. {message}. "
            "Then run the same command again: it goes on from there"
        )
