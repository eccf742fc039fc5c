"""The order of data: a pure function of (seed, epoch, data fingerprint).

An epoch is a seeded permutation of a source's runs (contiguous samples of a shard). The epochs of a source,
one after another, are one endless sequence of runs; lane l of L takes runs l, l + L, l + 2L, ... of it. So a
lane's place in a source is two whole numbers: its turn (runs begun) and the next sample in that run.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lclm.data.reading import Damaged
from lclm.data.settings import ReadingSettings, SourceSettings
from lclm.data.shards import DataSet, Sample

READ_BYTES = 1 << 22
"""About how many bytes of text a lane reads ahead within a run."""

_MASK = (1 << 64) - 1


def seed_of(*parts: Any) -> int:
    """A 128-bit number that depends on every part; equal parts give equal numbers everywhere."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def permuted(index: int, size: int, key: int) -> int:
    """Place `index` of a pseudorandom permutation of range(size), in constant time and memory.

    A balanced Feistel network over the next even number of bits, walked until it lands inside `size`.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(6):
            left, right = right, left ^ (_mix(right ^ (key >> (turn * 16)) ^ (turn << 58)) & low)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class Place:
    """One sample of a lane: the `index`-th of the `turn`-th run of a source that the lane takes."""

    turn: int
    index: int


@dataclass(frozen=True)
class Run:
    """A run as the data set numbers it: samples `start` to `stop` of a shard, in one epoch."""

    epoch: int
    shard: int
    start: int
    stop: int


class Source:
    """One data set and the seeded order of its runs, shared by all lanes.

    epochs: how often it is passed; None means for ever. ValueError for an empty or unreadable data set.
    """

    def __init__(
        self,
        name: str,
        settings: SourceSettings,
        *,
        seed: int,
        run_samples: int,
        epochs: int | None = None,
        reading: ReadingSettings | None = None,
    ) -> None:
        self.name, self.seed, self.run_samples, self.epochs = name, seed, run_samples, epochs
        try:
            self.data = DataSet.open(settings.path, reading)
        except ValueError as error:
            raise ValueError(f"data source {name!r}: {error}") from error
        self.fingerprint = self.data.fingerprint
        self.runs = self.data.runs(run_samples)
        if not self.runs:
            raise ValueError(f"data source {name!r}: {settings.path} holds no samples; build it again")
        self._keys: dict[int, int] = {}

    def run(self, number: int) -> Run | None:
        """Run `number` of the endless sequence of epochs; None beyond the last epoch."""
        epoch, place = divmod(number, self.runs)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        shard, start, stop = self.data.run(permuted(place, self.runs, self._key(epoch)), self.run_samples)
        return Run(epoch, shard, start, stop)

    def _key(self, epoch: int) -> int:
        if epoch not in self._keys:
            self._keys[epoch] = seed_of("order", self.seed, self.fingerprint, epoch)
        return self._keys[epoch]

    def draws(self, epoch: int, shard: int, number: int, offset: int) -> random.Random:
        """The random numbers of one example: the same wherever and whenever it is made."""
        return random.Random(seed_of("sample", self.seed, self.fingerprint, epoch, shard, number, offset))


@dataclass
class Held:
    """A sample on its way into packs, with the character offset up to which it has been used."""

    sample: Sample
    place: Place
    epoch: int
    shard: int
    number: int
    offset: int = 0


class SourceLane:
    """One lane's walk through one source. `turn` and `index` are its whole state.

    skip is told of every sample that cannot be used, and may raise; without it such a sample is an error.
    passed: samples that the walk has come past since it was made, usable or not.
    """

    def __init__(
        self,
        source: Source,
        lane: int,
        lanes: int,
        turn: int = 0,
        index: int = 0,
        skip: Callable[[str, Damaged], None] | None = None,
    ) -> None:
        self.source, self.lane, self.lanes = source, lane, lanes
        self.turn, self.index = turn, index
        self.passed = 0
        self._skip = skip
        self._buffer: deque[Held | Damaged] = deque()
        self._begun: tuple[int, Run | None] = (-1, None)

    def pull(self) -> Held | None:
        """The lane's next sample that can be used, or None when all epochs are used up."""
        while True:
            held = self._next()
            if not isinstance(held, Damaged):
                return held
            self._damaged(held)

    def _next(self) -> Held | Damaged | None:
        while True:
            if self._begun[0] != self.turn:
                self._begun = self.turn, self.source.run(self.lane + self.turn * self.lanes)
            run = self._begun[1]
            if run is None:
                return None
            if self.index < run.stop - run.start:
                break
            self.turn, self.index = self.turn + 1, 0
        if not self._buffer:
            self._buffer.extend(self._read(run, self.turn, self.index, run.stop - run.start))
        held = self._buffer.popleft()
        self.index += 1
        self.passed += 1
        return held

    def _damaged(self, problem: Damaged) -> None:
        if self._skip is None:
            raise problem
        self._skip(self.source.name, problem)

    def fetch(self, places: Sequence[Place]) -> list[Held | None]:
        """The samples at places where this lane has been, read again; None for one that is usable no longer.

        One or a few reads for each run that they are in.
        """
        found: dict[Place, Held | Damaged] = {}
        for turn in sorted({place.turn for place in places}):
            found |= self._fetch(turn, sorted({place.index for place in places if place.turn == turn}))
        usable: list[Held | None] = []
        for sample in (found[place] for place in places):
            if isinstance(sample, Damaged):
                self._damaged(sample)
            usable.append(None if isinstance(sample, Damaged) else sample)
        return usable

    def _run_of(self, turn: int, index: int) -> Run:
        run = self.source.run(self.lane + turn * self.lanes)
        if run is None or run.start + index >= run.stop:
            raise ValueError(
                f"data source {self.source.name!r} has no sample at run {turn}, index {index} of "
                f"lane {self.lane}: the cursor belongs to other data or other settings"
            )
        return run

    def _fetch(self, turn: int, indexes: list[int]) -> dict[Place, Held | Damaged]:
        """Samples of one run, neighbours together."""
        run = self._run_of(turn, indexes[-1])
        found: dict[Place, Held | Damaged] = {}
        while indexes:
            samples = self._read(run, turn, indexes[0], indexes[-1] + 1)
            at_once = [index for index in indexes if index - indexes[0] < len(samples)]
            found |= {Place(turn, index): samples[index - indexes[0]] for index in at_once}
            indexes = indexes[len(at_once) :]
        return found

    def _read(self, run: Run, turn: int, index: int, stop: int) -> list[Held | Damaged]:
        """Samples `index` up to `stop` of the run, fewer when they are long."""
        first, last = run.start + index, run.start + stop
        try:
            sizes = self.source.data.text_bytes(run.shard, first, last).cumsum()
        except Damaged as problem:
            return [problem] * (last - first)
        count = max(1, int((sizes <= READ_BYTES).sum()))
        return [
            sample
            if isinstance(sample, Damaged)
            else Held(sample, Place(turn, index + i), run.epoch, run.shard, first + i)
            for i, sample in enumerate(self.source.data.read_each(run.shard, first, first + count))
        ]
