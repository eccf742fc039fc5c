"""Windows of memories, and the encoder's rows that hold them. numpy only.

Shape letters: E encoder rows, R row length, W window, N ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .spans import Geometry


@dataclass(frozen=True, eq=False)
class Window:
    """One window of a memory, as it goes into a row.

    ids: its row tokens, overlap and markers included. blocks: int64, the latent of each (-1: not pooled).
    """

    ids: np.ndarray
    blocks: np.ndarray


def cut(ids: np.ndarray, geometry: Geometry, ratio: int | None = None, first: int = 0) -> list[Window]:
    """The windows of a memory of tokens `ids`, whose first latent has the number `first`."""
    ratio = ratio or geometry.ratio
    starts = range(0, len(ids), geometry.window)
    return [
        _cut(ids, start, min(start + geometry.window, len(ids)), ratio, first, geometry) for start in starts
    ]


def _cut(ids: np.ndarray, start: int, stop: int, ratio: int, first: int, geometry: Geometry) -> Window:
    low = max(0, start - geometry.overlap)
    high = min(len(ids), stop + geometry.overlap) if geometry.bidirectional else stop
    text = ids[low:high]
    if geometry.pooling == "eos":
        markers = -(-(stop - start) // ratio)
        blocks = np.full(len(text) + markers, -1, np.int64)
        blocks[len(text) :] = np.arange(markers) + (first + start // ratio)
        return Window(np.append(text, np.full(markers, geometry.encoder_marker_id, text.dtype)), blocks)
    blocks = np.full(len(text), -1, np.int64)
    blocks[start - low : stop - low] = np.arange(start, stop) // ratio + first
    return Window(text, blocks)


def fill_rows(lengths: Sequence[int], row_length: int) -> tuple[list[int], list[int], int]:
    """First-fit decreasing: put windows of the given row tokens into rows of `row_length`.

    Returns (row of each window, offset of each window in its row, rows used). Deterministic; a window longer
    than a row is a ValueError.
    """
    rows, offsets = [0] * len(lengths), [0] * len(lengths)
    used: list[int] = []
    shortest = min(lengths, default=0)
    open_from = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_length:
            raise ValueError(f"a window of {length} tokens does not fit an encoder row of {row_length}")
        while open_from < len(used) and used[open_from] + shortest > row_length:
            open_from += 1
        for row in range(open_from, len(used)):
            if used[row] + length <= row_length:
                break
        else:
            row = len(used)
            used.append(0)
        rows[index], offsets[index] = row, used[row]
        used[row] += length
    return rows, offsets, len(used)


def rows_needed(lengths: Sequence[int], row_length: int) -> int:
    """Encoder rows that `lay_out` uses for these windows."""
    return fill_rows(lengths, row_length)[2]


def lay_out_windows(
    windows: Sequence[Window], geometry: Geometry, budget: int | None = None
) -> dict[str, np.ndarray]:
    """The encoder's arrays of `windows`: encoder_input_ids, encoder_position_ids, encoder_window_ids,
    block_index, int64 [E, R]; E is `budget` if given, else as many rows as it takes."""
    lengths = [len(window.ids) for window in windows]
    rows, offsets, used = fill_rows(lengths, geometry.row_length)
    row_length = geometry.row_length
    if budget is None:
        longest = max((offset + length for offset, length in zip(offsets, lengths, strict=True)), default=1)
        row_length = min(row_length, longest if longest <= 512 else -(-longest // 64) * 64)
    elif used > budget:
        raise ValueError(f"the memories fill {used} encoder rows, over the budget of {budget}")
    shape = (used if budget is None else budget, row_length)
    ids = np.full(shape, geometry.encoder_pad_id, np.int64)
    positions = np.zeros(shape, np.int64)
    window_ids = np.full(shape, -1, np.int64)
    blocks = np.full(shape, -1, np.int64)
    ends = np.zeros(shape[0], np.int64)
    for number, (window, row, offset) in enumerate(zip(windows, rows, offsets, strict=True)):
        end = offset + len(window.ids)
        ids[row, offset:end] = window.ids
        positions[row, offset:end] = np.arange(len(window.ids))
        window_ids[row, offset:end] = number
        blocks[row, offset:end] = window.blocks
        ends[row] = max(ends[row], end)
    tail = np.arange(row_length) - ends[:, None]
    positions = np.where(tail >= 0, tail, positions)
    return {
        "encoder_input_ids": ids,
        "encoder_position_ids": positions,
        "encoder_window_ids": window_ids,
        "block_index": blocks,
    }
