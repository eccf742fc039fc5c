"""The processes' lifeline: each tells every second where it is, and who is lost, ended or stuck is named.

The main process hosts a small store of its own. Every process has two threads: one talks to the store, one
judges (the main process over all, the others over the main process) and, at a verdict, writes the stacks of
all its threads to `RUN/faults` and ends the process if its main thread does not. A process whose threads
cannot run at all, with the interpreter's lock held in C, writes its stacks and ends by faulthandler's timer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from lclm.train.ends import COMPLETE, LOST, REQUEUE, WRONG, Lost, Requeue, end
from lclm.train.places import Limits, Place, Seen, Verdict, judge, main_frame, name
from lclm.train.settings import EngineSettings

BEAT = 1.0
"""Seconds between two beats."""
REACH = timedelta(seconds=5)
"""For the store to answer."""
GRACE = 3.0
"""Seconds that a process's main thread has to end by itself after a verdict."""
LINGER = 10.0
"""Seconds that the main process waits, at its end, for the others to have heard of it."""


def host_name() -> str:
    """This machine's name, as the scheduler calls it where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Lifeline:
    """This process's lifeline, as a context manager around all that needs the other processes."""

    def __init__(self, rank: int, size: int, settings: EngineSettings) -> None:
        """Limits come from `engine.timeout_minutes` and `engine.alone_minutes`."""
        still = settings.timeout_minutes * 60
        self.rank, self.size = rank, size
        self.limits = Limits(
            silent=min(still, max(30.0, still / 5)),
            failed=4 * BEAT,
            still=still,
            alone=max(still, settings.alone_minutes * 60),
        )
        self.place = Place(host=host_name(), long=True)
        self.verdict: Verdict | None = None
        self._found: Verdict | None = None
        self._judged, self._closing, self._over = threading.Event(), threading.Event(), threading.Event()
        self._wake = threading.Event()
        self._store: Any = None
        self._broken = ""
        self._alone = self._released = 0
        self._hurry = False
        self._main_thread = threading.get_ident()
        self._faults: IO[str] | None = None
        now = time.monotonic()
        known = range(size) if rank == 0 else (0, rank)
        self._seen = {one: Seen(heard=now, moved=now) for one in known}

    # what the main thread does

    def __enter__(self) -> Lifeline:
        if self.size > 1:
            self._connect()
        if not faulthandler.is_enabled() and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        self._arm()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()
        return self

    def write_to(self, folder: Path) -> None:
        """Stacks go to a file of this process in `folder` from now on, not to standard error."""
        folder.mkdir(parents=True, exist_ok=True)
        self._faults = (folder / f"process-{self.rank:04d}.txt").open("a")
        self._arm()

    def _arm(self) -> None:
        """Set faulthandler's timer again: it goes off when no thread of this process can do so in time."""
        file = self._faults or sys.__stderr__ or 2
        faulthandler.dump_traceback_later(self.limits.still + BEAT, exit=True, file=file)

    def at(self, phase: str, step: int | None = None, *, long: bool = False) -> None:
        """This process enters a phase; all processes enter the same ones in the same order.

        long: it may take `engine.alone_minutes`.
        """
        self.place.phase, self.place.step = phase, self.place.step if step is None else step
        self.place.long = long
        self.place.marks += 1

    @contextlib.contextmanager
    def alone(self, phase: str) -> Iterator[None]:
        """Around work of the main process only: the others wait, patiently, until it is done. Collective.

        Raises what the verdict says if the main process does not come to its end.
        """
        before = self.place.phase, self.place.step, self.place.long
        self.at(phase, long=True)
        self._alone += 1
        yield
        if self.rank == 0 and self._store is not None:
            self._store.set("released", str(self._alone))
        elif self._store is not None:
            self._hurry = True
            self._wake.set()
            while self._released < self._alone:
                if self._judged.wait(0.02):
                    assert self.verdict is not None
                    raise self.verdict.error()
            self._hurry = False
        self.at(*before[:2], long=before[2])

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        verdict = None
        if isinstance(error, Exception) and not isinstance(error, (ValueError, OSError, Requeue)):
            verdict = self.explain(error)
        self._close(verdict.error() if verdict else error)
        if verdict is not None:
            raise verdict.error() from error

    def explain(self, error: Exception) -> Verdict | None:
        """Why something failed on this process: another one's end, if there is one. Waits some seconds."""
        if self.verdict is None and self.size > 1:
            traces = list(traceback.walk_tb(error.__traceback__))
            self.place.look(traces[-1][0] if traces else None)
            self.place.failed = f"{type(error).__name__}: {error}"
            self._wake.set()
            self._judged.wait(self.limits.failed + 3 * BEAT)
        text = str(error)
        between = isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text
        if self.verdict is None and self.size > 1 and between:
            self._write_stacks(text)
            return Verdict(LOST, f"the processes answer, but what they send each other fails: {text[:500]}")
        return self.verdict

    def _close(self, error: BaseException | None) -> None:
        """Leave: tell the others, wait a little for them to hear it where this process hosts the store."""
        code = COMPLETE if error is None or (isinstance(error, Requeue) and error.together) else _code(error)
        text = str(error) if code in (WRONG, REQUEUE, LOST) else f"{type(error).__name__}: {error}"
        if code in (WRONG, REQUEUE) and self.verdict is None and self.size > 1:
            text = f"{name(self.rank, self.place)} ended: {text}"
        self.place.end = [code, text]
        self._closing.set()
        self._wake.set()
        if self.rank == 0 and self._store is not None:
            if code != COMPLETE and self.verdict is None:
                found = judge({0: Seen(self.place)}, 0.0, self.limits)
                assert found is not None
                self._publish(found)
            self._linger(LINGER if code == COMPLETE else GRACE + 2 * BEAT)
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * BEAT)
        faulthandler.cancel_dump_traceback_later()
        if self._faults is not None:
            self._faults.close()
            with contextlib.suppress(OSError):
                if not os.path.getsize(self._faults.name):
                    os.remove(self._faults.name)

    def _linger(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            quiet = time.monotonic() - self.limits.failed
            others = [seen for rank, seen in self._seen.items() if rank]
            if all(seen.place.end or seen.place.told or seen.heard < quiet for seen in others):
                return
            self._wake.set()
            time.sleep(0.05)

    # the store

    def _connect(self) -> None:
        """Open the main process's store and let every process join it. Collective."""
        mine = None
        if self.rank == 0:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=REACH)
            for one in range(self.size):
                self._store.set(_key(one), Place().pack())
            self._store.set("verdict", "")
            self._store.set("released", "0")
            mine = (_addresses(), self._store.port, uuid.uuid4().hex)
            self._store.set("run", mine[2])
        offered: list[Any] = [None] * self.size
        dist.all_gather_object(offered, (self.place.host, mine))
        for one, seen in self._seen.items():
            seen.place.host = offered[one][0]
        if self.rank:
            self._store = _join(name(0, self._seen[0].place), *offered[0][1])

    def _publish(self, verdict: Verdict) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set("verdict", f"{verdict.code}\n{verdict.text}")

    def _talk(self) -> None:
        """The talking thread: a beat a second. A store that is gone is noted; the judge decides."""
        while True:
            last = self._over.is_set() or (self.rank and self._judged.is_set())
            self.place.beats += 1
            if not self.place.failed:
                self.place.look(main_frame(self._main_thread))
            now = time.monotonic()
            self._seen[self.rank].take(Place(**vars(self.place)), now)
            if self._store is not None:
                try:
                    self._exchange()
                except RuntimeError as error:
                    if "imeout" not in str(error):  # the connection is gone, not only slow
                        self._broken = f"{type(error).__name__}: {error}"
                        return
            if last:
                return
            self._wake.wait(max(0.1, self.size / 2000) if self._hurry else BEAT)
            self._wake.clear()

    def _exchange(self) -> None:
        self._store.set(_key(self.rank), self.place.pack())
        others = [one for one in self._seen if one != self.rank]
        *places, verdict, released = self._store.multi_get(
            [*(_key(one) for one in others), "verdict", "released"]
        )
        now = time.monotonic()
        for one, text in zip(others, places, strict=True):
            place = Place.unpack(text.decode())
            if place.beats:
                self._seen[one].take(place, now)
        self._released = int(released)
        if verdict and self.rank:
            code, _, text = verdict.decode().partition("\n")
            self._found = Verdict(int(code), text)

    # the judge

    def _watch(self) -> None:
        """The judging thread."""
        ticked = time.monotonic()
        while not self._over.wait(BEAT / 2):
            now = time.monotonic()
            self._arm()
            if now - ticked > 5 * BEAT:  # the whole process was stopped
                for seen in self._seen.values():
                    seen.shift(now - ticked)
            ticked = now
            verdict = self._found or self._own_verdict(now)
            if verdict is not None and not self._closing.is_set():
                self._carry_out(verdict)
                return

    def _own_verdict(self, now: float) -> Verdict | None:
        left = self._seen[0].place.end is not None  # in order: it has said so
        if self._broken and self.rank and not left and not self._closing.wait(GRACE):
            return Verdict(
                LOST,
                f"{name(0, self._seen[0].place)} is gone, it was last seen at {self._seen[0].place}; the "
                f"connection to it broke ({self._broken.splitlines()[0][:200]})\n"
                f"this is {name(self.rank, self.place)}: {self.place}",
            )
        self._seen[self.rank].heard = now
        if self.rank == 0:
            return judge(self._seen, now, self.limits)
        # of the main process, whether it answers; whether all go on, it judges
        return judge(self._seen, now, replace(self.limits, still=math.inf, alone=math.inf))

    def _carry_out(self, verdict: Verdict) -> None:
        if self.rank == 0 and self._store is not None:
            self._publish(verdict)
        if verdict.code == LOST:
            writing = threading.Thread(target=self._write_stacks, args=(verdict.text,), daemon=True)
            writing.start()
            writing.join(2 * BEAT)  # not for ever: the file system may be what hangs
            if self._faults is not None:
                verdict = Verdict(LOST, f"{verdict.text}\nstacks: {Path(self._faults.name).parent}")
        self.verdict = verdict
        self.place.told = True
        self._wake.set()
        self._judged.set()
        if self._closing.wait(GRACE):
            return
        self.place.end = [verdict.code, verdict.text]
        self._wake.set()
        if self.rank == 0 and self._store is not None:
            self._linger(GRACE)
        print(f"[process {self.rank}] {verdict.text}", file=sys.stderr, flush=True)
        end(verdict.code, at_once=True)

    def _write_stacks(self, why: str) -> None:
        file = self._faults or sys.__stderr__
        if file is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            file.write(f"\n{stamp} {name(self.rank, self.place)} at {self.place}\n{why}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _code(error: BaseException) -> int:
    for kind, code in ((Requeue, REQUEUE), (Lost, LOST), ((ValueError, OSError), WRONG)):
        if isinstance(error, kind):
            return code
    return 1


def _key(rank: int) -> str:
    return f"process/{rank}"


def _addresses() -> list[str]:
    """How others may reach this host: by the address that leads to the rendezvous, or by its name."""
    named = os.environ.get("MASTER_ADDR", "127.0.0.1")
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((named, int(os.environ.get("MASTER_PORT", 1))))
        found.append(probe.getsockname()[0])
    if found and found[0].startswith("127."):
        found.insert(0, named)
    return list(dict.fromkeys([*found, named, socket.gethostname()]))


def _join(where: str, addresses: list[str], port: int, run: str) -> Any:
    for address in addresses:
        with contextlib.suppress(RuntimeError):
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=REACH)
            if store.get("run").decode() == run:
                return store
    raise ValueError(
        f"{where} cannot be reached at {' or '.join(addresses)}, port {port}: processes of one "
        "run must be able to connect to the first one's host; look at its firewall and at MASTER_ADDR"
    )
