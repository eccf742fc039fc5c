"""How a run ends before it is complete: what asks it to stop, and exit codes (explained in docs/faults.md).

Light: `lclm train` listens to signals before it imports anything heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

COMPLETE, WRONG, REQUEUE, LOST = 0, 2, 75, 76
"""Exit codes of `lclm train`: complete; a restart will not help; stopped as asked, start me again; a process
was lost or hung, start me again. Any other is a crash."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_SECONDS = 3.0
"""A launcher may pass on a signal that its processes have had already: only later ones mean "at once"."""


_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def end_with_launcher() -> None:
    """Let this process end with the torchrun that started it, if one did.

    Killed, torchrun cannot end its processes: they would go on beside those of the next start, or wait for
    each other for minutes. So this comes before anything that takes time to import.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


class Requeue(Exception):
    """The run was asked to stop and has; nothing is lost, the same command goes on.

    together: all processes raise it at the same place; otherwise this one has to tell the others.
    """

    def __init__(self, reason: str, *, together: bool = False) -> None:
        super().__init__(reason)
        self.together = together


class Lost(Exception):
    """Another process was lost, or hangs; the same command goes on from the newest checkpoint."""


class Stop:
    """What asks this process to stop: signals, the recipe's limits, the scheduler's limit.

    As a context manager it listens to SIGTERM, SIGINT and SIGUSR1. The first raises Requeue where the process
    stands, or is noted, inside `at_step_ends`. Another (but SIGUSR1), some seconds later, ends the process.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.steps = 0
        self._begun = time.monotonic()
        self._asked = 0.0
        self._noted_only = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Stop:
        self._handlers = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._handlers.items():
            # after an error the process is ending already; SIG_IGN would be handed down to what it starts
            signal.signal(number, handler if kind is None else lambda *_: None)

    def _hear(self, number: int, _: object) -> None:
        if os.getpid() != self._pid:
            return  # a background process that was just forked
        now, name = time.monotonic(), signal.Signals(number).name
        if self.reason is None:
            self.reason, self._asked = name, now
            if self._noted_only:
                _say(f"{name}: stopping after this step, with a checkpoint")
            else:
                raise Requeue(name)
        elif number != signal.SIGUSR1 and now - self._asked > AGAIN_SECONDS:
            _say(f"{name} again: ending at once; the newest checkpoint stands")
            end(REQUEUE, at_once=True)

    @contextlib.contextmanager
    def at_step_ends(self) -> Iterator[None]:
        """Around the steps: signals are noted, for all processes to stop together after a step."""
        with self._noting(True):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around what can be left out or done again: raises Requeue, now or at a signal."""
        with self._noting(False):
            self.check()
            yield

    @contextlib.contextmanager
    def _noting(self, noted_only: bool) -> Iterator[None]:
        before, self._noted_only = self._noted_only, noted_only
        try:
            yield
        finally:
            self._noted_only = before

    def check(self) -> None:
        """Raise Requeue if a signal came."""
        if self.reason is not None:
            raise Requeue(self.reason)

    def wanted(self, settings: Any, steps: int = 0) -> str | None:
        """Why this process wants to stop once it has made `steps` more steps, or None.

        `settings`: the recipe's `train:` section.
        """
        if self.reason is not None:
            return self.reason
        made, minutes = self.steps + steps, (time.monotonic() - self._begun) / 60
        if settings.stop_after_steps is not None and made >= settings.stop_after_steps:
            return f"train.stop_after_steps={settings.stop_after_steps}"
        if settings.stop_after_minutes is not None and minutes >= settings.stop_after_minutes:
            return f"train.stop_after_minutes={settings.stop_after_minutes:g}"
        end_time = os.environ.get("SLURM_JOB_END_TIME", "")
        left = (float(end_time) - time.time()) / 60 if end_time.isdecimal() else float("inf")
        if left <= settings.stop_before_limit_minutes:
            return f"the scheduler's time limit is {max(left, 0):.1f} minutes away"
        return None


def _say(text: str) -> None:
    """A line from within a signal's handler: print() may be in the middle of one."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


def end(code: int, *, at_once: bool = False) -> NoReturn:
    """End this process with `code`, without the interpreter's own end if process groups are open.

    With them it may hang, when another process is gone, or abort: gloo's threads are still running.
    """
    dist = sys.modules.get("torch.distributed")
    if not at_once and (dist is None or not dist.is_initialized()):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
