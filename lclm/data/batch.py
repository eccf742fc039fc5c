"""Steps of batches: the packs of a process's lanes, made in background processes, collated to tensors."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lclm.data.arrays import Batch, LaidOut, Step, lay_out_pack, make_batch
from lclm.data.settings import DataSettings, PackSettings, SourceSettings, TaskSettings
from lclm.model.spans import Geometry

if TYPE_CHECKING:
    from lclm.data.packing import Lane
    from lclm.data.stream import Source
    from lclm.model.text import SpanTokenizer

__all__ = [
    "Batch",
    "DataSettings",
    "Loader",
    "PackSettings",
    "SourceSettings",
    "Step",
    "TaskSettings",
    "make_lanes",
    "merge_states",
]

STATE_SCHEMA = 1
_PARENT_DEATH_SIGNAL = 1


@dataclass
class _Failure:
    """An error of a worker, without its traceback: data errors are for users."""

    message: str


def make_lanes(
    settings: DataSettings,
    tokenizer: SpanTokenizer,
    geometry: Geometry,
    numbers: Iterable[int],
    *,
    seed: int,
    mixture: Mapping[str, float],
    ratios: Sequence[int] | None = None,
    cursors: Mapping[str, Mapping[str, Any]] | None = None,
    sources: Mapping[str, Source] | None = None,
) -> list[Lane]:
    """Lanes of the given numbers. ratios: what a task without `ratios` draws from (None: the geometry's).
    sources: those of the tasks, if they are open already.

    ValueError for a missing or damaged data set, or one of a kind that its task cannot read.
    """
    from lclm.data.packing import Lane
    from lclm.data.tasks import make_task

    shares = {name: share for name, share in mixture.items() if share > 0}
    tasks = {}
    for name in shares:
        tasks[name] = make_task(name, settings.tasks[name], tokenizer, geometry, ratios)
    if sources is None:
        sources = _open_sources(settings, {task.settings.source for task in tasks.values()}, seed)
    for name, task in tasks.items():
        kind = sources[task.settings.source].data.kind
        if kind != task.kind:
            raise ValueError(
                f"data.tasks.{name}: task {task.settings.task!r} reads {task.kind}, but source "
                f"{task.settings.source!r} holds {kind}"
            )
    return [
        Lane(
            number,
            settings.lanes,
            sources,
            tasks,
            shares,
            settings.pack,
            geometry,
            lookahead=settings.lookahead,
            cursor=(cursors or {}).get(str(number)),
            reading=settings.reading,
        )
        for number in numbers
    ]


def _open_sources(settings: DataSettings, names: Iterable[str], seed: int) -> dict[str, Source]:
    from lclm.data.stream import Source

    return {
        name: Source(
            name,
            settings.sources[name],
            seed=seed,
            run_samples=settings.run_samples,
            epochs=settings.epochs,
            reading=settings.reading,
        )
        for name in sorted(names)
    }


@dataclass
class _Packs:
    """The packs of a process's lanes, in turn. In a worker: of every `workers`-th lane."""

    settings: DataSettings
    tokenizer: SpanTokenizer
    geometry: Geometry
    lanes: Sequence[int]
    options: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LaidOut | _Failure]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        if worker is None:
            yield from self._packs(self.lanes)
            return
        try:
            yield from self._packs(self.lanes[worker.id :: worker.num_workers])
        except ValueError as error:
            yield _Failure(str(error))

    def _packs(self, numbers: Sequence[int]) -> Iterator[LaidOut]:
        lanes = make_lanes(self.settings, self.tokenizer, self.geometry, numbers, **self.options)
        names = list(self.settings.tasks)
        while True:
            for lane in lanes:
                yield lay_out_pack(lane.next_pack(), names, self.settings.pack, self.geometry)


def _start_worker(worker: int) -> None:
    """Let the worker end with its parent, leave signals to that, and keep what it inherited as it is."""
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to all processes of a job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _same(item: Any) -> Any:
    return item


def _in_background(packs: _Packs, workers: int, prefetch: int) -> Iterator[Any]:
    """Iterate over packs in `workers` processes; their order is that of one process."""
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(packs)

    return iter(
        DataLoader(
            Stream(),
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            worker_init_fn=_start_worker,
            prefetch_factor=prefetch,
            multiprocessing_context="fork" if sys.platform == "linux" else None,
        )
    )


class Loader:
    """Iterates over `Step`s for ever; one process's share of the lanes.

    seed: of the order of data. rank, world: this process and how many there are. mixture, pack: a stage's
    own, instead of the settings'. cursor: a state to go on from, of `state()` or `merge_states` (which may
    come from another stage or another number of processes). ratios: what memories of tasks that name none
    are drawn from.

    The steps depend on none of workers, rank, world: lane l is the same everywhere. ValueError for settings
    that do not work together, data that is missing or damaged, or a cursor of other data.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: SpanTokenizer,
        geometry: Geometry,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        mixture: Mapping[str, float] | None = None,
        pack: PackSettings | None = None,
        cursor: Mapping[str, Any] | None = None,
        ratios: Sequence[int] | None = None,
    ) -> None:
        settings = replace(settings, pack=pack or settings.pack, mixture=dict(mixture or settings.mixture))
        settings.validate()
        self.settings, self.accumulation = settings, settings.accumulation(world)
        share = settings.lanes // world
        self.lanes = list(range(rank * share, (rank + 1) * share))
        self.seed = seed
        used = {settings.tasks[name].source for name, part in settings.mixture.items() if part > 0}
        sources = _open_sources(settings, used, seed)
        self._fingerprints = {name: source.fingerprint for name, source in sources.items()}
        self._cursors = self._begin(cursor)
        self._packs = _Packs(
            settings,
            tokenizer,
            geometry,
            self.lanes,
            {
                "seed": seed,
                "mixture": settings.mixture,
                "ratios": ratios,
                "cursors": dict(self._cursors),
                "sources": sources,  # background processes share the memory of what is open here
            },
        )
        self.workers = max(n for n in range(min(settings.workers, share) + 1) if n == 0 or share % n == 0)
        self._iterator: Iterator[Any] | None = None

    def _begin(self, state: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
        """Cursors of this process's lanes; empty where a lane has not begun."""
        from lclm.data.packing import carried

        if state is None:
            return {}
        ours = self._state({})
        for name in ("schema", "lanes", "seed", "run_samples"):
            if state.get(name) != ours[name]:
                raise ValueError(
                    f"the data cursor was made with {name} {state.get(name)!r}, this run has {ours[name]!r}; "
                    "start a new run, or set it back"
                )
        for source, fingerprint in state["fingerprints"].items():
            if self._fingerprints.get(source, fingerprint) != fingerprint:
                raise ValueError(
                    f"data source {source!r} has fingerprint {self._fingerprints[source]}, the cursor was "
                    f"made with {fingerprint}: the data has changed; give the same data or start a new run"
                )
        cursors = {}
        for lane in map(str, self.lanes):
            if state["cursors"] and lane not in state["cursors"]:
                raise ValueError(
                    f"the data cursor lacks lane {lane}; merge the states of all processes with merge_states"
                )
            if lane in state["cursors"]:
                cursor = state["cursors"][lane]
                same = state["mixture"] == ours["mixture"] and state["pack"] == ours["pack"]
                cursors[lane] = dict(cursor) if same else carried(cursor)
        return cursors

    def _state(self, cursors: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.settings
        return {
            "schema": STATE_SCHEMA,
            "lanes": settings.lanes,
            "seed": self.seed,
            "run_samples": settings.run_samples,
            "fingerprints": dict(self._fingerprints),
            "mixture": {name: float(share) for name, share in settings.mixture.items()},
            "pack": [value for value in astuple(settings.pack) if value is not None],
            "cursors": dict(cursors),
        }

    def state(self) -> dict[str, Any]:
        """Where this process's lanes stand after the last step taken, as plain data for JSON."""
        return self._state(self._cursors)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._iterator is None:
            if self.workers:
                self._iterator = _in_background(self._packs, self.workers, self.settings.prefetch)
            else:
                self._iterator = iter(self._packs)
        items = [self._next_pack() for _ in self.lanes]
        size = self.settings.micro_batch
        names, shape = list(self.settings.tasks), self.settings.pack
        row_length = self._packs.geometry.row_length
        batches = [
            make_batch(items[i : i + size], names, shape, row_length) for i in range(0, len(items), size)
        ]
        self._cursors = {str(item.pack.lane): item.pack.cursor for item in items}
        return Step(batches)

    def _next_pack(self) -> LaidOut:
        assert self._iterator is not None
        item = next(self._iterator)
        if isinstance(item, _Failure):
            self.close()
            raise ValueError(item.message)
        return item

    def close(self) -> None:
        """End the background processes. Iterating again goes on after the last step taken."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        self._iterator = None
        self._packs.options["cursors"] = dict(self._cursors)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of all lanes from the states of all processes. ValueError if they do not belong together."""
    if not states:
        raise ValueError("there are no states to merge")
    first = {key: value for key, value in states[0].items() if key != "cursors"}
    cursors: dict[str, Any] = {}
    for state in states:
        if {key: value for key, value in state.items() if key != "cursors"} != first:
            raise ValueError(
                "the processes' data states differ in more than their lanes; they run other recipes"
            )
        cursors.update(state["cursors"])
    return first | {"cursors": dict(sorted(cursors.items(), key=lambda item: int(item[0])))}
