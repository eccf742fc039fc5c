"""Where the processes of a run stand, and the judgement over them: who ended, fell silent or stands still."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from lclm.train.ends import COMPLETE, LOST, REQUEUE, WRONG, Lost, Requeue

COLLECTIVES = ("distributed_c10d.py", "torch.py")
"""Files of torch.distributed and deepspeed.comm whose frames mean: waiting for other processes."""


@dataclass
class Place:
    """Where a process says it is.

    marks: phases it has entered, in an order that is the same on all processes. long: one that may take long,
    such as work of the main process alone. line: where its main thread is; waiting: whether in a collective.
    failed: it cannot go on, and asks why. told: it knows the verdict. end: [exit code, why] when it leaves.
    """

    host: str = ""
    phase: str = "start"
    step: int = 0
    marks: int = 0
    long: bool = False
    line: str = ""
    waiting: bool = False
    failed: str = ""
    told: bool = False
    end: list[int | str] | None = None
    beats: int = 0

    def pack(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def unpack(cls, text: str) -> Place:
        """From `pack`."""
        return cls(**json.loads(text))

    def look(self, frame: FrameType | None) -> None:
        """Take down the innermost line of a thread, and whether it waits in a collective."""
        self.line, self.waiting = "", False
        if frame is not None:
            code = frame.f_code
            self.line = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.name == COLLECTIVES[0] or (path.name == COLLECTIVES[1] and path.parent.name == "comm"):
                self.waiting = True
            frame = frame.f_back

    def __str__(self) -> str:
        where = f"step {self.step:,}, {self.phase}"
        return f"{where}, in {self.line}" if self.line else where


@dataclass
class Seen:
    """What one process knows of another: its last word, when it came, and when it last entered a phase."""

    place: Place = field(default_factory=Place)
    heard: float = 0.0
    moved: float = 0.0

    def take(self, place: Place, now: float) -> None:
        """Note what was read at `now` (monotonic seconds)."""
        if place.beats != self.place.beats:
            self.heard = now
        if place.marks != self.place.marks:
            self.moved = now
        self.place = place

    def shift(self, seconds: float) -> None:
        """This process itself slept so long: nobody is to blame for it."""
        self.heard += seconds
        self.moved += seconds


@dataclass(frozen=True)
class Limits:
    """Seconds: without a beat, without one when a process failed, in one phase, in a long one."""

    silent: float
    failed: float
    still: float
    alone: float


@dataclass(frozen=True)
class Verdict:
    """Why the processes end, and the exit code."""

    code: int
    text: str

    def error(self) -> Exception:
        """As an exception that the command line gives this exit code."""
        kinds: dict[int, type[Exception]] = {REQUEUE: Requeue, WRONG: ValueError}
        return kinds.get(self.code, Lost)(self.text)


def judge(seen: Mapping[int, Seen], now: float, limits: Limits) -> Verdict | None:
    """The verdict over the processes that this one knows; None while all is well."""
    ended = {
        rank: one.place.end
        for rank, one in seen.items()
        if one.place.end is not None and one.place.end[0] != COMPLETE
    }
    for code in (WRONG, REQUEUE, LOST):
        for end in ended.values():
            if end[0] == code:
                return Verdict(code, str(end[1]))
    if ended:
        rank, end = next(iter(ended.items()))
        who = name(rank, seen[rank].place)
        return Verdict(LOST, f"{who} ended with an error: {end[1]}\n{others(seen, [rank])}")
    alive = {rank: one for rank, one in seen.items() if one.place.end is None}
    failed = any(one.place.failed for one in alive.values())
    patience = limits.failed if failed else limits.silent
    lost = [rank for rank, one in alive.items() if now - one.heard > patience]
    if lost:
        longest = max(now - seen[rank].heard for rank in lost)
        return Verdict(
            LOST,
            f"{names(lost, seen)} {verb(lost)} not answer: no sign of life for {longest:.0f} s; "
            f"last seen {at(lost, seen)}\n{others(seen, lost)}",
        )
    still = limits.alone if any(one.place.long for one in alive.values()) else limits.still
    if any(now - one.moved > still for one in alive.values()):
        stuck = blocking({rank: one.place for rank, one in alive.items()})
        longest = max(now - seen[rank].moved for rank in stuck)
        silent = [rank for rank in stuck if now - seen[rank].heard > limits.failed]
        nor = " or answer" if silent else ""
        return Verdict(
            LOST,
            f"{names(stuck, seen)} {verb(stuck)} not go on{nor}: {longest:.0f} s {at(stuck, seen)}\n"
            f"{others(seen, stuck)}",
        )
    return None


def blocking(places: Mapping[int, Place]) -> list[int]:
    """Of processes that do not go on, those that the others wait for.

    Those that are furthest behind and, among them, those that do not wait in a collective themselves.
    """
    least = min(place.marks for place in places.values())
    behind = [rank for rank, place in places.items() if place.marks == least]
    return [rank for rank in behind if not places[rank].waiting] or behind


def name(rank: int, place: Place) -> str:
    """A process with its host."""
    return f"process {rank} ({place.host})" if place.host else f"process {rank}"


def names(ranks: Iterable[int], seen: Mapping[int, Seen]) -> str:
    """Processes with their hosts: "process 3 (node2)", "processes 2, 3 (node2)"."""
    hosts: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        hosts.setdefault(seen[rank].place.host, []).append(rank)
    parts = [
        name(some[0], Place(host=host)) if len(some) == 1 else f"processes {listed(some)} ({host})"
        for host, some in hosts.items()
    ]
    return " and ".join(parts) if len(parts) < 3 else ", ".join(parts)


def listed(ranks: list[int]) -> str:
    """Numbers, runs of them shortened: "0, 4-7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def verb(ranks: list[int]) -> str:
    """Does or do."""
    return "does" if len(ranks) == 1 else "do"


def at(ranks: Iterable[int], seen: Mapping[int, Seen]) -> str:
    """Where some processes are, each place once."""
    return "at " + "; ".join(dict.fromkeys(str(seen[rank].place) for rank in ranks))


def others(seen: Mapping[int, Seen], but: Iterable[int]) -> str:
    """Where the processes that are not to blame stand, those at one place together."""
    places: dict[str, list[int]] = {}
    for rank in sorted(seen.keys() - set(but)):
        places.setdefault(str(seen[rank].place), []).append(rank)
    return "\n".join(f"{names(ranks, seen)}: {place}" for place, ranks in places.items())


def main_frame(thread: int) -> FrameType | None:
    """The innermost frame of a thread."""
    return sys._current_frames().get(thread)
