"""Slow processes are named: one that holds the others up, and single steps that took long.

All processes take a step in the time of the slowest. Which one that is shows in what each does before it
meets the others: waiting for its data, and its forward pass. At ZeRO 3 forward passes wait for other
processes' parameters, so there a fixed matrix product is timed instead.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from lclm.train.lifeline import host_name
from lclm.train.metrics import Clock, matmul_flops
from lclm.train.processes import Processes

FACTOR = 1.5
"""Times the median of the others, from which on a process is slow."""
SHARE = 0.1
"""Share of a step's time that it must cost at least."""
LINES = 3
"""Lines of metrics in a row before it is said."""
LONG_STEP = 3.0
"""Times the usual step from which on a single step is long."""
LEAST_LONG = 0.5
"""Seconds by which it must be longer."""
PARTS = {"data": "waiting for data", "forward": "in the forward pass", "product": "in a fixed matrix product"}
"""What a process does on its own, and the words for it."""
_PRODUCT = 2.0 * 512**3


@dataclass(frozen=True)
class Found:
    """Something slow: an event for metrics.jsonl, and a sentence."""

    event: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Look:
    """spread: {part: {"median", "most", "process"}} for a line of metrics; found: what is slow."""

    spread: dict[str, dict[str, float]]
    found: list[Found]


class Slowness:
    """Compares the processes at every line of metrics. Every process has one. Collective."""

    def __init__(self, processes: Processes, zero: int) -> None:
        self._processes, self._zero = processes, zero
        self._hosts: list[str] = processes.gather(host_name()) if processes.size > 1 else [host_name()]
        self._in_a_row: dict[tuple[int, str], int] = {}
        self._usual: list[float] = []

    def name(self, rank: int) -> str:
        """A process with its host."""
        return f"process {rank} ({self._hosts[rank]})"

    def look(self, clock: Clock, stage_step: int) -> Look:
        """Compare the processes. Collective.

        clock: of the steps since the last line, the last of which is the stage's `stage_step`.
        """
        own = self._own(clock)
        table = torch.zeros(self._processes.size, len(own), dtype=torch.float64)
        table[self._processes.rank] = torch.tensor(list(own.values()), dtype=torch.float64)
        table = self._processes.sum(table.to(self._processes.device)).cpu()
        columns = {name: table[:, i].tolist() for i, name in enumerate(own)}
        step_seconds = statistics.median(clock.seconds_of_steps)
        found = []
        if self._processes.size > 1:
            found += self._slow(columns, step_seconds)
        if stage_step > clock.steps:  # the first steps of a start are longer
            found += self._long_step(columns, clock, stage_step)
        parts = [part for part in columns if part in ("update", *PARTS)]
        spread = {
            part: {
                "median": statistics.median(columns[part]),
                "most": max(columns[part]),
                "process": columns[part].index(max(columns[part])),
            }
            for part in parts
        }
        return Look(spread if self._processes.size > 1 else {}, found)

    def _own(self, clock: Clock) -> dict[str, float]:
        spent = {name: clock.spent[name] / clock.steps for name in ("data", "forward", "update")}
        if self._zero == 3 and self._processes.size > 1:
            spent.pop("forward")
            spent["product"] = _PRODUCT / matmul_flops(self._processes.device, seconds=0.01)
        return spent | {f"longest {name}": clock.longest.get(name, 0.0) for name in ("data", "forward")}

    def _slow(self, columns: dict[str, list[float]], step_seconds: float) -> list[Found]:
        """Processes that have now been slower than the others for so many lines; said once, until it ends."""
        found, slow = [], {}
        for part in (part for part in PARTS if part in columns):
            others = usual(columns[part])
            for rank, seconds in enumerate(columns[part]):
                costs = part == "product" or seconds - others > SHARE * step_seconds
                if seconds > FACTOR * others and costs:
                    slow[rank, part] = count = self._in_a_row.get((rank, part), 0) + 1
                    if count == LINES:
                        figures = {"seconds": seconds, "others": others}
                        about = {"process": rank, "host": self._hosts[rank], "part": part, **figures}
                        text = (
                            f"{self.name(rank)} is slow: {seconds:.3g} s a step {PARTS[part]}, the others "
                            f"{others:.3g} s, for {LINES} lines of metrics"
                        )
                        found.append(Found({"event": "slow", **about}, text))
        self._in_a_row = slow
        return found

    def _long_step(self, columns: dict[str, list[float]], clock: Clock, stage_step: int) -> list[Found]:
        """The longest step since the last line, if it was far longer than steps usually are."""
        seconds = clock.longest["seconds"]
        self._usual = (self._usual + clock.seconds_of_steps)[-50:]
        typical = statistics.median(self._usual)
        if seconds < LONG_STEP * typical or seconds - typical < LEAST_LONG or len(self._usual) < 5:
            return []
        number = stage_step - clock.steps + int(clock.longest["step"]) + 1
        excess = {
            (rank, part): value - columns[part][rank]
            for part in ("data", "forward")
            for rank, value in enumerate(columns[f"longest {part}"])
            if part in columns
        }
        (rank, part), more = max(excess.items(), key=lambda item: item[1])
        where: dict[str, Any] = {}
        text = f"step {number:,} took {seconds:.3g} s, usually {typical:.3g} s"
        if more > (seconds - typical) / 3:
            where = {"process": rank, "host": self._hosts[rank], "part": part}
            text += f": {self.name(rank)} was {columns[f'longest {part}'][rank]:.3g} s {PARTS[part]}"
        return [
            Found(
                {"event": "slow_step", "of_step": number, "seconds": seconds, "usual": typical, **where}, text
            )
        ]


def usual(seconds: list[float]) -> float:
    """What most processes take: their median; of two, the faster one's."""
    return statistics.median(seconds) if len(seconds) > 2 else min(seconds)
