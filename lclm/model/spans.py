"""Spans, examples, and the one function that lays them out as the model's arrays.

The processor, packing and tasks all come here, so what is trained is what is served. numpy only.

Shape letters: B rows, D decoder positions, E encoder rows, R row length, W window, N ratio, M latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from .windows import Window, cut, lay_out_windows

NO_LOSS = -100
"""Label of a position that bears no loss."""


@dataclass(frozen=True, eq=False)
class Span:
    """A run of tokens of one kind.

    ids: int32 [T], T >= 1; the decoder's ids for text, the encoder's ids for memory.
    loss: whether the tokens of a text span bear loss; memory never does.
    ratio: tokens per latent of a memory span; None means the geometry's.
    latents: of a memory that is ready (compressed before, in an artifact): how many it has; its ids are
    empty.
    """

    kind: Literal["text", "memory"]
    ids: np.ndarray
    loss: bool = False
    ratio: int | None = None
    latents: int | None = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids, dtype=np.int32)
        if self.kind not in ("text", "memory"):
            raise ValueError(f"Span.kind is {self.kind!r}; it must be 'text' or 'memory'")
        if self.latents is not None:
            self._check_ready(ids, self.latents)
        elif ids.ndim != 1 or ids.size == 0:
            raise ValueError(
                f"a {self.kind} span needs at least one token id in one dimension, got {ids.shape}"
            )
        if self.kind == "memory" and self.loss:
            raise ValueError("a memory span never bears loss; put the text to be learned into a text span")
        if self.kind == "text" and self.ratio is not None:
            raise ValueError("a text span has no ratio; only memory is compressed")
        object.__setattr__(self, "ids", ids)

    @classmethod
    def ready(cls, latents: int) -> Span:
        """A memory whose `latents` latents are there already."""
        return cls("memory", np.zeros(0, np.int32), latents=latents)

    def _check_ready(self, ids: np.ndarray, latents: int) -> None:
        if self.kind != "memory" or ids.size or self.ratio is not None or latents < 1:
            raise ValueError(
                f"a span that is ready is a memory of at least one latent, without ids and ratio; got "
                f"kind {self.kind!r}, {ids.size} ids, ratio {self.ratio}, {latents} latents"
            )


@dataclass(frozen=True, eq=False)
class Example:
    """An ordered list of spans: one document or one conversation.

    key: the sample's key (or keys) for messages. task: the mixture entry's name, for loss per task.
    """

    spans: tuple[Span, ...]
    key: str = ""
    task: str = ""

    def __post_init__(self) -> None:
        if not self.spans:
            raise ValueError(f"example {self.key!r} has no spans")
        object.__setattr__(self, "spans", tuple(self.spans))


@dataclass(frozen=True)
class Size:
    """What an example costs: decoder positions (of D), row tokens of each window (of E x R), latents (of
    M)."""

    positions: int
    windows: tuple[int, ...]
    latents: int


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """All that decides how spans become arrays. `LCLMConfig.geometry()` makes it.

    ratio: default tokens per latent. window: tokens the encoder pools at once, a multiple of every ratio.
    overlap: tokens of the neighbouring windows seen but not pooled (left; right too when bidirectional).
    max_ratio: the largest ratio that a span may name (None: any). With pooling other than "mean" only
    `ratio`.
    """

    ratio: int
    window: int
    memory_start_id: int
    memory_id: int
    memory_end_id: int
    pad_id: int
    encoder_pad_id: int
    encoder_marker_id: int
    overlap: int = 0
    pooling: str = "mean"
    bidirectional: bool = False
    max_ratio: int | None = None

    def __post_init__(self) -> None:
        if self.overlap < 0:
            raise ValueError(f"overlap is {self.overlap}; it must be 0 or more tokens")
        self._check_ratio(self.ratio)

    def _check_ratio(self, ratio: int) -> None:
        if ratio < 1 or self.window < 1 or self.window % ratio:
            raise ValueError(
                f"ratio {ratio} does not divide the window of {self.window} tokens; "
                "choose a window that is a multiple of every ratio"
            )
        if ratio == self.ratio:
            return
        if self.pooling != "mean":
            raise ValueError(
                f"a span asks for ratio {ratio}, but pooling {self.pooling!r} works at the model's ratio "
                f"{self.ratio} only; several ratios need pooling 'mean'"
            )
        if self.max_ratio is not None and ratio > self.max_ratio:
            raise ValueError(
                f"a span asks for ratio {ratio}, but this model's position-in-block embedding "
                f"ends at ratio {self.max_ratio}; use a ratio up to that"
            )

    @cached_property
    def row_length(self) -> int:
        """R: W + overlaps + markers, rounded up to a multiple of 64 when above 512."""
        length = self.window + self.overlap * (2 if self.bidirectional else 1)
        if self.pooling == "eos":
            length += self.window // self.ratio
        return length if length <= 512 else -(-length // 64) * 64

    def span_ratio(self, span: Span) -> int:
        """The ratio of a memory span: its own or the default; ValueError if this geometry cannot serve it."""
        if span.ratio is None or span.ratio == self.ratio:
            return self.ratio
        self._check_ratio(span.ratio)
        return span.ratio

    def latents(self, tokens: int, ratio: int | None = None) -> int:
        """Latents of a memory of `tokens` tokens: ceil(T / N)."""
        return -(-tokens // (ratio or self.ratio))

    def windows(self, tokens: int, ratio: int | None = None) -> np.ndarray:
        """int64 [windows]: row tokens that each window of a memory takes, overlap and markers included."""
        starts = np.arange(0, tokens, self.window)
        stops = np.minimum(starts + self.window, tokens)
        lows = np.maximum(starts - self.overlap, 0)
        highs = np.minimum(stops + self.overlap, tokens) if self.bidirectional else stops
        lengths = highs - lows
        if self.pooling == "eos":
            lengths = lengths + -(-(stops - starts) // (ratio or self.ratio))
        return lengths

    def size(self, example: Example) -> Size:
        """What `example` costs in D, E and M."""
        positions, latents, windows = 0, 0, []
        for span in example.spans:
            if span.kind == "text":
                positions += len(span.ids)
                continue
            ratio = self.span_ratio(span)
            count = span.latents or self.latents(len(span.ids), ratio)
            positions += count + 2
            latents += count
            windows.extend(self.windows(len(span.ids), ratio).tolist())
        return Size(positions, tuple(windows), latents)


@dataclass
class _Memories:
    """The windows and sizes of all memories of a batch, in order of appearance."""

    windows: list[Window] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ready: list[bool] = field(default_factory=list)
    latents: int = 0

    def add(self, span: Span, geometry: Geometry) -> tuple[int, int]:
        """Cut a memory span into windows; returns (its first latent, how many)."""
        ratio, first = geometry.span_ratio(span), self.latents
        count = span.latents or geometry.latents(len(span.ids), ratio)
        self.windows += cut(span.ids, geometry, ratio, first)
        self.sizes.append(count)
        self.ready.append(span.latents is not None)
        self.latents += count
        return first, count


def _lay_out_row(examples: Sequence[Example], geometry: Geometry, memories: _Memories) -> list[np.ndarray]:
    """[ids, positions, labels, latent index] of one row's real tokens."""
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    latents: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    for example in examples:
        begin = len(labels)
        for span in example.spans:
            if span.kind == "text":
                ids.append(span.ids)
                labels.append(span.ids if span.loss else np.full(len(span.ids), NO_LOSS))
                latents.append(np.full(len(span.ids), -1))
                continue
            first, count = memories.add(span, geometry)
            block = np.full(count + 2, geometry.memory_id)
            block[0], block[-1] = geometry.memory_start_id, geometry.memory_end_id
            index = np.arange(first - 1, first + count + 1)
            index[0] = index[-1] = -1
            ids.append(block)
            labels.append(np.full(count + 2, NO_LOSS))
            latents.append(index)
        if labels[begin][0] != NO_LOSS:
            labels[begin] = labels[begin].copy()
            labels[begin][0] = NO_LOSS
        positions.append(np.arange(sum(len(part) for part in labels[begin:])))
    return [
        np.concatenate(parts) if parts else np.zeros(0, np.int64)
        for parts in (ids, positions, labels, latents)
    ]


def lay_out(
    rows: Sequence[Sequence[Example]],
    geometry: Geometry,
    *,
    positions: int | None = None,
    encoder_rows: int | None = None,
    latents: int | None = None,
    padding_side: str = "right",
) -> dict[str, np.ndarray]:
    """Lay out rows of examples as the model's arrays, all int64.

    Returns input_ids, position_ids (from 0 for each example and for the padding), labels (the token at its
    own position, -100 without loss), latent_index (-1 for text), attention_mask (1 for real tokens): [B, D];
    encoder_input_ids, encoder_position_ids, encoder_window_ids (-1 padding), block_index (latent of each
    token, -1 not pooled): [E, R]; memory_sizes [n]: latents per memory, in order of appearance; and where
    some memories are ready, memory_ready [n]: 1 for those, whose latents no encoder row makes.

    positions, encoder_rows, latents are the fixed budgets D, E, M: arrays are padded to them (memory_sizes
    with zeros to length M) and more is a ValueError. None means as large as needed; rows are then no longer
    than used.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
    memories = _Memories()
    parts = [_lay_out_row(row, geometry, memories) for row in rows]
    longest = max((len(part[0]) for part in parts), default=0)
    if positions is not None and longest > positions:
        raise ValueError(f"a row has {longest} decoder positions, over the budget of {positions}")
    width = longest if positions is None else positions
    shape = (len(parts), width)
    arrays: dict[str, np.ndarray] = {
        "input_ids": np.full(shape, geometry.pad_id, np.int64),
        "position_ids": np.zeros(shape, np.int64),
        "labels": np.full(shape, NO_LOSS, np.int64),
        "latent_index": np.full(shape, -1, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
    }
    for row, (ids, place, labels, index) in enumerate(parts):
        pad = width - len(ids)
        real = slice(pad, width) if padding_side == "left" else slice(0, len(ids))
        padding = slice(0, pad) if padding_side == "left" else slice(len(ids), width)
        arrays["input_ids"][row, real] = ids
        arrays["position_ids"][row, real] = place
        arrays["position_ids"][row, padding] = np.arange(pad)
        arrays["labels"][row, real] = labels
        arrays["latent_index"][row, real] = index
        arrays["attention_mask"][row, real] = 1
    arrays.update(lay_out_windows(memories.windows, geometry, encoder_rows))
    if latents is not None and memories.latents > latents:
        raise ValueError(f"the memories make {memories.latents} latents, over the budget of {latents}")
    sizes = np.zeros(len(memories.sizes) if latents is None else latents, np.int64)
    sizes[: len(memories.sizes)] = memories.sizes
    arrays["memory_sizes"] = sizes
    if any(memories.ready):
        arrays["memory_ready"] = np.zeros(len(sizes), np.int64)
        arrays["memory_ready"][: len(memories.ready)] = memories.ready
    return arrays


def collate(packs: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put laid-out packs of equal widths into one batch: rows one after another, latents numbered without
    gaps."""
    if not packs:
        raise ValueError("collate needs at least one pack")
    if len(packs) == 1:
        return dict(packs[0])
    latents = np.cumsum([0] + [int(pack["memory_sizes"].sum()) for pack in packs])
    windows = np.cumsum([0] + [int(pack["encoder_window_ids"].max(initial=-1)) + 1 for pack in packs])
    offsets = {"latent_index": latents, "block_index": latents, "encoder_window_ids": windows}
    if any("memory_ready" in pack for pack in packs):
        packs = [{"memory_ready": np.zeros_like(pack["memory_sizes"]), **pack} for pack in packs]
    batch = {}
    for name in packs[0]:
        parts = [pack[name] for pack in packs]
        if name in offsets:
            parts = [
                np.where(part >= 0, part + offset, -1)
                for part, offset in zip(parts, offsets[name], strict=False)
            ]
        batch[name] = np.concatenate(parts)
    return batch
