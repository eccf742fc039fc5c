"""Packs of fixed shape, filled lane by lane.

A lane holds a few samples of every task of the mixture. Each pack is filled in three passes: first tasks
whose examples have a size of their own (chat, reconstruct), as far as their share of source tokens is due;
then tasks that can be cut to any size, which even out decoder positions and encoder rows; then whatever
still fits. Where no task of the mixture can be cut so, the choice among waiting conversations evens them out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lclm.data.reading import LANE_LEAST, LANE_MOST, Damaged, count_damaged, too_many
from lclm.data.room import Room
from lclm.data.settings import PackSettings, ReadingSettings
from lclm.data.stream import Held, Place, Source, SourceLane
from lclm.data.tasks import Chat, Cut, Document, Task
from lclm.model.spans import Example, Geometry

__all__ = ["Lane", "Pack", "PackSettings", "carried"]

SLACK = 0.02
"""Part of the row tokens by which positions and rows may be out of balance before a pack is nearly full."""
NOTES = 4
"""Damaged samples that a pack describes at most."""
MOST_DROPPED = 10_000
"""Conversations dropped one after another before the lane gives up."""


@dataclass
class Pack:
    """One training row before it is laid out.

    used: decoder positions, row tokens and latents. source_tokens: before compression, by task. dropped:
    samples left out or shortened since the last pack, by "task: reason", or "source: reason" where they were
    damaged. cursor: where the lane stands after this pack. read: samples read since the last pack. damage:
    what was wrong with some of those dropped, naming files.
    """

    lane: int
    examples: list[Example]
    used: tuple[int, int, int]
    source_tokens: dict[str, int]
    dropped: dict[str, int]
    cursor: dict[str, Any]
    read: int = 0
    damage: list[str] = field(default_factory=list)


@dataclass
class _Waiting:
    """A conversation that was read, made into an example, and not yet packed."""

    held: Held
    cut: Cut
    done: str | None


@dataclass
class _Entry:
    """One task of the mixture in one lane: its share of source tokens, what it took, the samples it holds."""

    task: Task
    share: float
    stream: SourceLane
    capacity: int
    taken: int = 0
    documents: list[Document] = field(default_factory=list)
    waiting: list[_Waiting] = field(default_factory=list)
    exhausted: bool = False

    @property
    def alive(self) -> bool:
        return bool(self.documents or self.waiting) or not self.exhausted

    @property
    def held(self) -> list[Held]:
        return [document.held for document in self.documents] + [item.held for item in self.waiting]


def carried(cursor: Mapping[str, Any]) -> dict[str, Any]:
    """A lane's cursor for another mixture or pack shape: the same place in the data, shares counted anew."""
    return {**cursor, "packs": 0, "taken": {}}


class Lane:
    """One deterministic sequence of packs. The same arguments and cursor always give the same packs.

    tasks and shares: the mixture, by task name; tasks of one source share its samples. cursor: as in `Pack`.
    ValueError for data that a task cannot use.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        sources: Mapping[str, Source],
        tasks: Mapping[str, Task],
        shares: Mapping[str, float],
        pack: PackSettings,
        geometry: Geometry,
        *,
        lookahead: int = 32,
        cursor: Mapping[str, Any] | None = None,
        reading: ReadingSettings | None = None,
    ) -> None:
        cursor = cursor or {}
        self.reading = reading or ReadingSettings()
        self.number, self.pack, self.geometry = number, pack, geometry
        self.packs = int(cursor.get("packs", 0))
        self.dropped = Counter(cursor.get("dropped", {}))
        self._new_dropped: Counter[str] = Counter()
        self._read_before = self._last_read = int(cursor.get("read", 0))
        self._damage: list[str] = []
        places = cursor.get("sources", {})
        self.streams = {
            name: SourceLane(source, number, lanes, turn, index, self._skip)
            for name, source in sources.items()
            for turn, index in [places.get(name, (0, 0))]
        }
        self._unused = {name: place for name, place in places.items() if name not in self.streams}
        total = sum(shares.values())
        self.entries: dict[str, _Entry] = {}
        for name, share in shares.items():
            if share > 0:
                task = tasks[name]
                stream = self.streams[task.settings.source]
                capacity = lookahead if task.kind == "conversations" else max(1, lookahead // 4)
                taken = int(cursor.get("taken", {}).get(name, 0))
                self.entries[name] = _Entry(task, share / total, stream, capacity, taken)
        self._orphans: dict[str, list[list[Any]]] = {}
        self._restore(cursor.get("held", {}))

    def _restore(self, held: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """Read held samples again; those of a task that is gone go to another task of the same source."""
        for source, records in held.items():
            heirs = [entry for entry in self.entries.values() if entry.task.settings.source == source]
            kept: list[tuple[_Entry, Place, int]] = []
            for turn, record in enumerate(records):
                name, run, index, offset = record
                entry = self.entries.get(name)
                if entry is None or entry.task.settings.source != source:
                    entry = heirs[turn % len(heirs)] if heirs else None
                if entry is None:
                    self._orphans.setdefault(source, []).append(list(record))
                else:
                    kept.append((entry, Place(run, index), offset))
            samples = self.streams[source].fetch([place for _, place, _ in kept]) if kept else []
            for (entry, _, offset), sample in zip(kept, samples, strict=True):
                if sample is not None:
                    sample.offset = offset
                    self._hold(entry, sample)

    def cursor(self) -> dict[str, Any]:
        """Where the lane stands, as plain data: enough to make all packs that follow."""
        held = {source: [list(record) for record in records] for source, records in self._orphans.items()}
        for name, entry in self.entries.items():
            records = held.setdefault(entry.task.settings.source, [])
            records += [[name, h.place.turn, h.place.index, h.offset] for h in entry.held]
        return {
            "packs": self.packs,
            "taken": {name: entry.taken for name, entry in self.entries.items()},
            "sources": self._unused
            | {name: [stream.turn, stream.index] for name, stream in self.streams.items()},
            "held": held,
            "dropped": dict(self.dropped),
            "read": self.read,
        }

    def next_pack(self) -> Pack:
        """Fill the next pack. A lane whose epochs are used up gives packs without examples, for ever."""
        for entry in self.entries.values():
            self.refill(entry)
        before = {name: entry.taken for name, entry in self.entries.items()}
        filling = _Filling(self)
        filling.run()
        if not filling.examples and any(entry.alive for entry in self.entries.values()):
            raise ValueError(self._too_small())
        self.packs += 1
        dropped, self._new_dropped = dict(self._new_dropped), Counter()
        damage, self._damage = self._damage, []
        read, self._last_read = self.read - self._last_read, self.read
        room, whole = filling.room, Room(self.pack, self.geometry)
        return Pack(
            lane=self.number,
            examples=filling.examples,
            used=(
                whole.positions - room.positions,
                whole.row_tokens - room.row_tokens,
                whole.latents - room.latents,
            ),
            source_tokens={
                name: entry.taken - before[name]
                for name, entry in self.entries.items()
                if entry.taken > before[name]
            },
            dropped=dropped,
            cursor=self.cursor(),
            read=read,
            damage=damage,
        )

    @property
    def read(self) -> int:
        """Samples that the lane has come past since the run began."""
        return self._read_before + sum(stream.passed for stream in self.streams.values())

    def _skip(self, source: str, problem: Damaged) -> None:
        """Count a sample that cannot be used. ValueError where nearly all of a lane's samples are such.

        Whether a few are too many is decided over all lanes together, once per step.
        """
        self.drop(source, problem.reason)
        if len(self._damage) < NOTES:
            self._damage.append(f"{problem.file} ({problem.reason})")
        own, most = count_damaged(self.dropped), min(self.reading.max_skipped, LANE_MOST)
        if own > max(LANE_LEAST, most, (1 + self.reading.max_skipped_share) / 2 * self.read):
            raise ValueError(too_many(self.dropped, self.read, [str(problem)], self.reading))

    def drop(self, task: str, reason: str) -> None:
        """Count something that was left out or shortened."""
        self.dropped[f"{task}: {reason}"] += 1
        self._new_dropped[f"{task}: {reason}"] += 1

    def refill(self, entry: _Entry) -> None:
        """Read samples until the entry holds as many as it may."""
        in_a_row = 0
        while len(entry.documents) + len(entry.waiting) < entry.capacity and not entry.exhausted:
            held = entry.stream.pull()
            if held is None:
                entry.exhausted = True
            elif self._hold(entry, held):
                in_a_row = 0
            else:
                in_a_row += 1
                if in_a_row >= min(MOST_DROPPED, 2 * entry.stream.source.data.num_samples + 64):
                    raise ValueError(
                        f"task {entry.task.name!r}: {in_a_row} conversations in a row were dropped "
                        f"({dict(self.dropped)}); raise data.pack, set over_budget: shorten, or use others"
                    )

    def _hold(self, entry: _Entry, held: Held) -> bool:
        """Keep a sample for packing; False if it was dropped (and counted)."""
        if not isinstance(entry.task, Chat):
            entry.documents.append(Document(held, entry.task.tokenizer))
            return True
        empty = Room(self.pack, self.geometry)
        draws = entry.stream.source.draws(held.epoch, held.shard, held.number, 0)
        cut, done = entry.task.conversation(held, empty, draws)
        if cut is None:
            self.drop(entry.task.name, done or "unusable")
            return False
        entry.waiting.append(_Waiting(held, cut, done))
        return True

    def _too_small(self) -> str:
        names = ", ".join(name for name, entry in self.entries.items() if entry.alive)
        return (
            f"a pack of {self.pack.positions} positions, {self.pack.rows} encoder rows and "
            f"{self.pack.latents} latents cannot hold a single example of {names}; raise "
            "data.pack (`lclm data budget` proposes values) or lower min_span"
        )


class _Filling:
    """The filling of one pack of a lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.room = Room(lane.pack, lane.geometry)
        self.examples: list[Example] = []
        self.entries = [entry for entry in lane.entries.values() if entry.alive]
        self.rows = self.room.row_tokens
        taken = sum(entry.taken for entry in lane.entries.values())
        self.usual = taken / lane.packs if lane.packs else float(lane.pack.positions)
        shares = sum(entry.share for entry in self.entries)
        draining = len(self.entries) < len(lane.entries)
        self.uncut = not any(entry.task.flexible for entry in self.entries)
        self.goal = {e.task.name: e.share / shares * (taken + self.usual) for e in self.entries}
        self.surplus = float("inf") if draining else 2 * self.usual
        self.highest = max((self._highest_rate(entry) for entry in self.entries), default=0.0)

    def _highest_rate(self, entry: _Entry) -> float:
        """The most row tokens per decoder position that an example of the task can take now."""
        sizes = [item.cut.size for item in entry.waiting]
        return max([entry.task.rates()[1], *(sum(size.windows) / size.positions for size in sizes)])

    def due(self, entry: _Entry) -> float:
        """Source tokens by which the task is behind its share, this pack's part included."""
        return self.goal[entry.task.name] - entry.taken

    def run(self) -> None:
        sized = [entry for entry in self.entries if not entry.task.flexible]
        flexible = [entry for entry in self.entries if entry.task.flexible]
        self._repeat(sized, self._due_example)
        self._repeat(flexible, self._evening_example)
        self._repeat([entry for entry in self.entries if entry.task.compresses], self._any_example)
        self._repeat(self.entries, self._any_example)

    def _repeat(self, entries: list[_Entry], offer: Callable[[_Entry], bool]) -> None:
        """Let the task that is furthest behind add an example, until none can."""
        entries = list(entries)
        while entries and self.room.positions:
            entry = max(entries, key=self.due)
            if not offer(entry):
                entries.remove(entry)

    def _due_example(self, entry: _Entry) -> bool:
        if self.due(entry) <= 0:
            return False
        for number in self._by_fit(entry):
            if self._may_add(entry, entry.waiting[number].cut):
                return self._add_waiting(entry, number)
        return bool(entry.documents) and self._add_document(entry, careful=True)

    def _evening_example(self, entry: _Entry) -> bool:
        limit = self.room.positions
        if not entry.task.compresses:
            if self.due(entry) <= 0:
                return False
            if self.highest > 0:
                spare = max(0.0, self.room.row_tokens - SLACK * self.rows)
                limit = int(self.room.positions - spare / self.highest)
            return limit > 0 and self._add_document(entry, limit=limit, careful=True)
        return self.due(entry) > -self.surplus and self._add_document(entry)

    def _any_example(self, entry: _Entry) -> bool:
        if self.due(entry) <= -self.surplus:
            return False
        for number in self._by_fit(entry):
            if self.room.fits(entry.waiting[number].cut.size):
                return self._add_waiting(entry, number)
        return bool(entry.documents) and self._add_document(entry)

    def _by_fit(self, entry: _Entry) -> list[int]:
        """Waiting conversations: the oldest first in a new pack, then what leaves the least of a row."""
        numbers = list(range(len(entry.waiting)))
        if not self.examples:
            return numbers
        if self.uncut:
            return self._evenly(entry, numbers)
        gaps, row_length = self.room.gaps[::-1], self.lane.geometry.row_length

        def left_over(number: int) -> int:
            windows = entry.waiting[number].cut.size.windows
            if not windows:
                return row_length
            place = bisect_left(gaps, windows[-1])
            return gaps[place] - windows[-1] if place < len(gaps) else row_length

        return sorted(numbers, key=left_over)

    def _evenly(self, entry: _Entry, numbers: list[int]) -> list[int]:
        """The oldest first until half of the positions or rows are used, then what evens out the two.

        What a pack passes over is old in the next, so that no kind of conversation piles up.
        """
        positions, rows = self.lane.pack.positions, self.rows
        if 2 * self.room.positions > positions and 2 * self.room.row_tokens > rows:
            return numbers

        def unevenness(number: int) -> int:
            size = entry.waiting[number].cut.size
            tokens = self.room.row_tokens - sum(size.windows)
            return abs((self.room.positions - size.positions) * rows - tokens * positions)

        return sorted(numbers, key=unevenness)

    def _may_add(self, entry: _Entry, cut: Cut) -> bool:
        """Whether an example fits, is due, and leaves positions and rows that others can fill together."""
        if self.examples:
            positions = self.room.positions - cut.size.positions
            rows = self.room.row_tokens - sum(cut.size.windows)
            uneven = rows > self.highest * positions + SLACK * self.rows
            if uneven or self.due(entry) < cut.source_tokens / 2:
                return False
        return self.room.fits(cut.size)

    def _add_waiting(self, entry: _Entry, number: int) -> bool:
        item = entry.waiting.pop(number)
        if item.done:
            self.lane.drop(entry.task.name, item.done)
        self._add(entry, item.cut)
        return True

    def _add_document(self, entry: _Entry, *, limit: int | None = None, careful: bool = False) -> bool:
        """Cut an example from the entry's next document; the document then waits behind the others."""
        if not entry.documents:
            return False
        document = entry.documents[0]
        held = document.held
        draws = entry.stream.source.draws(held.epoch, held.shard, held.number, held.offset)
        most = self.room.positions if limit is None else limit
        cut = entry.task.cut(document, self.room.for_cutting(), draws, most)
        if cut is None and not self.examples and document.blank:
            self.lane.drop(entry.task.name, "no tokens")
            entry.documents.pop(0)
            return True
        if cut is None or (careful and not self._may_add(entry, cut)):
            return False
        entry.documents.pop(0)
        if cut.offset is not None:
            held.offset = cut.offset
            entry.documents.append(document)
        self._add(entry, cut)
        return True

    def _add(self, entry: _Entry, cut: Cut) -> None:
        self.room.take(cut.size)
        self.examples.append(cut.example)
        entry.taken += cut.source_tokens
        self.lane.refill(entry)
