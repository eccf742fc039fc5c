"""Packs laid out as arrays, and put together to the batches of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lclm.data.settings import PackSettings
from lclm.model.spans import Example, Geometry, collate, lay_out

if TYPE_CHECKING:
    import torch

    from lclm.data.packing import Pack


@dataclass
class Batch:
    """One micro-batch of B packs.

    arrays: what the model's forward takes, int64 tensors (no attention_mask: packs need none), with
    `latents` rows in its table of latents (`num_latents`). task_ids [loss tokens]: index into task_names of
    every label that bears loss, in row-major order. keys: sample keys of each row. lanes: lane of each row.
    source_tokens: before compression, by task. positions, row_tokens, latents_used: real ones, of capacity
    (the same three with padding). dropped: samples left out or shortened since the last pack, by reason.
    read: samples read since then. damage: what was wrong with some that were damaged, naming files.
    """

    arrays: dict[str, torch.Tensor]
    num_latents: int
    task_ids: torch.Tensor
    task_names: list[str]
    keys: list[list[str]]
    lanes: list[int]
    source_tokens: dict[str, int]
    positions: int
    row_tokens: int
    latents_used: int
    capacity: tuple[int, int, int]
    dropped: dict[str, int]
    read: int = 0
    damage: list[str] = field(default_factory=list)

    @property
    def loss_tokens(self) -> int:
        """Labels that bear loss."""
        return len(self.task_ids)

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`."""
        arrays = {name: array.to(device, non_blocking=non_blocking) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, task_ids=self.task_ids.to(device, non_blocking=non_blocking))


@dataclass
class Step:
    """What one process contributes to one optimizer step: its micro-batches, in order.

    failure: why there are none. The others then have to be told, and `names` are the tasks' in their place.
    """

    micro_batches: list[Batch]
    failure: Exception | None = None
    names: list[str] = field(default_factory=list)

    @property
    def task_names(self) -> list[str]:
        return self.micro_batches[0].task_names if self.micro_batches else self.names

    @property
    def loss_tokens(self) -> int:
        return sum(batch.loss_tokens for batch in self.micro_batches)

    @property
    def source_tokens(self) -> int:
        return sum(sum(batch.source_tokens.values()) for batch in self.micro_batches)

    @property
    def empty(self) -> bool:
        """Whether all packs are empty: this process's lanes have used up their epochs."""
        return not any(keys for batch in self.micro_batches for keys in batch.keys)

    @property
    def keys(self) -> list[str]:
        """Keys of all samples of the step."""
        return [key for batch in self.micro_batches for row in batch.keys for key in row]

    @property
    def dropped(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for batch in self.micro_batches:
            total.update(batch.dropped)
        return dict(total)

    @property
    def read(self) -> int:
        """Samples read for the step, those left out included."""
        return sum(batch.read for batch in self.micro_batches)

    @property
    def damage(self) -> list[str]:
        """What was wrong with some of the samples that were left out."""
        return [note for batch in self.micro_batches for note in batch.damage]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)


@dataclass
class LaidOut:
    """One pack as arrays, on its way from a worker."""

    arrays: dict[str, np.ndarray]
    task_ids: np.ndarray
    keys: list[str]
    pack: Pack


def _loss_tokens(example: Example) -> int:
    first = example.spans[0]
    return sum(len(span.ids) for span in example.spans if span.loss) - (first.kind == "text" and first.loss)


def lay_out_pack(pack: Pack, names: Sequence[str], shape: PackSettings, geometry: Geometry) -> LaidOut:
    """The arrays of one pack. names: all tasks, whose order numbers them."""
    arrays = lay_out(
        [pack.examples],
        geometry,
        positions=shape.positions,
        encoder_rows=shape.rows,
        latents=shape.latents,
    )
    del arrays["attention_mask"]
    tasks = [names.index(example.task) for example in pack.examples]
    counts = [_loss_tokens(example) for example in pack.examples]
    keys = [example.key for example in pack.examples]
    return LaidOut(arrays, np.repeat(np.array(tasks, np.int64), counts), keys, replace(pack, examples=[]))


def make_batch(items: Sequence[LaidOut], names: list[str], shape: PackSettings, row_length: int) -> Batch:
    """One micro-batch of the packs, in order."""
    import torch

    arrays = collate([item.arrays for item in items])
    source_tokens: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for item in items:
        source_tokens.update(item.pack.source_tokens)
        dropped.update(item.pack.dropped)
    used = np.array([item.pack.used for item in items]).sum(0).tolist()
    count = len(items)
    return Batch(
        arrays={name: torch.from_numpy(array) for name, array in arrays.items()},
        num_latents=count * shape.latents,
        task_ids=torch.from_numpy(np.concatenate([item.task_ids for item in items])),
        task_names=names,
        keys=[item.keys for item in items],
        lanes=[item.pack.lane for item in items],
        source_tokens=dict(source_tokens),
        positions=used[0],
        row_tokens=used[1],
        latents_used=used[2],
        capacity=(count * shape.positions, count * shape.rows * row_length, count * shape.latents),
        dropped=dict(dropped),
        read=sum(item.pack.read for item in items),
        damage=[note for item in items for note in item.pack.damage],
    )
