"""The room that is left in a pack: decoder positions and attention over them, encoder rows, latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lclm.data.settings import PackSettings
from lclm.model.spans import Geometry, Size
from lclm.model.windows import fill_rows


class Room:
    """What is still free of a pack's budgets. Windows are placed exactly as `lay_out` will place them.

    positions, latents: free decoder positions and latents. open: how many of the positions the next example,
    or the one in the making, may take. windows: row tokens of the windows already placed.
    """

    def __init__(self, pack: PackSettings, geometry: Geometry) -> None:
        self.geometry, self.rows = geometry, pack.rows
        self.positions, self.latents = pack.positions, pack.latents
        self.open = pack.positions
        self.attention = pack.attention
        self.squares = (pack.attention or 0) * pack.positions
        self.windows: list[int] = []
        self._gaps: list[int] | None = None

    def copy(self) -> Room:
        """A room to try things in."""
        other = object.__new__(Room)
        other.geometry, other.rows = self.geometry, self.rows
        other.positions, other.latents, other.open = self.positions, self.latents, self.open
        other.attention, other.squares = self.attention, self.squares
        other.windows, other._gaps = list(self.windows), self._gaps
        return other

    def for_cutting(self) -> Room:
        """The same room for a text that can be cut: it keeps to attention's budget in an empty pack too."""
        room = self.copy()
        room.open = self._longest()
        return room

    def _longest(self) -> int:
        """Positions that an example may take and leave half of attention's budget for each position after it.

        An example of L positions takes L * L of the budget, attention * positions in all. With half kept,
        what follows may always be as long as half of `attention`: the pack fills up whatever came first.
        """
        if self.attention is None:
            return self.positions
        kept = max(1, self.attention // 2)
        spare = max(0, self.squares - kept * self.positions)
        return min(self.positions, (kept + math.isqrt(kept * kept + 4 * spare)) // 2)

    @property
    def row_tokens(self) -> int:
        """Row tokens that no window has taken yet."""
        return self.rows * self.geometry.row_length - sum(self.windows)

    @property
    def gaps(self) -> list[int]:
        """Free row tokens at the end of each encoder row, rows without any left out; largest first."""
        if self._gaps is None:
            row_length = self.geometry.row_length
            rows, _, _ = fill_rows(self.windows, row_length)
            free = [row_length] * self.rows
            for row, length in zip(rows, self.windows, strict=True):
                free[row] -= length
            self._gaps = sorted((gap for gap in free if gap), reverse=True)
        return self._gaps

    def fits_windows(self, windows: Sequence[int]) -> bool:
        """Whether `lay_out` would find rows for these windows beside the ones already here."""
        if not windows:
            return True
        if sum(windows) > self.row_tokens:
            return False
        return fill_rows(self.windows + list(windows), self.geometry.row_length)[2] <= self.rows

    def fits(self, size: Size) -> bool:
        """Whether an example of this size fits."""
        return (
            size.positions <= self.open and size.latents <= self.latents and self.fits_windows(size.windows)
        )

    def take(self, size: Size) -> None:
        """Take the room of an example that fits."""
        self._take(size)
        self.squares -= size.positions**2
        self.open = self._longest()

    def _take(self, size: Size) -> None:
        self.positions -= size.positions
        self.open -= size.positions
        self.latents -= size.latents
        if size.windows:
            self.windows.extend(size.windows)
            self._gaps = None

    def take_text(self, tokens: int) -> None:
        """Take the room of one text of the example in the making; a negative number gives it back."""
        self._take(Size(tokens, (), 0))

    def take_memory(self, tokens: int, ratio: int) -> None:
        """Take the room of one memory of the example in the making, its two marks included."""
        latents = self.geometry.latents(tokens, ratio)
        self._take(Size(latents + 2, tuple(self.geometry.windows(tokens, ratio).tolist()), latents))

    def fits_memory(self, tokens: int, ratio: int) -> bool:
        """Whether one memory of `tokens` tokens fits."""
        latents = self.geometry.latents(tokens, ratio)
        if latents > self.latents or latents + 2 > self.open:
            return False
        return self.fits_windows(self.geometry.windows(tokens, ratio).tolist())

    def memory_length(self, want: int, least: int, most: int, ratio: int) -> int:
        """A memory length near `want` that fits and leaves no gap in a row that nothing could fill; 0: none.

        Between `least` and `most` tokens, and a multiple of the ratio unless `most` itself is taken (the rest
        of a document). Where a row's gap is near, the gap is filled exactly.
        """
        most = min(most, self.latents * ratio)
        for length in self._lengths(min(want, most), least, most, ratio):
            if self.fits_memory(length, ratio):
                return length
        return 0

    def _lengths(self, want: int, least: int, most: int, ratio: int) -> list[int]:
        """Lengths to try, best first."""
        window, row_length = self.geometry.window, self.geometry.row_length
        empty = sum(gap == row_length for gap in self.gaps)
        partial = sorted({gap for gap in self.gaps if gap < row_length})
        fills: set[int] = set()
        near = min(empty, most // window, want // window + 2)
        for full in range(max(0, min(near, want // window - 2)), near + 1):
            fills.add(full * window)
            fills.update(full * window + self._tail(gap, full, ratio) for gap in partial)
        fills = {length for length in fills if max(1, least) <= length <= most}
        nearest = sorted(fills, key=lambda length: (abs(length - want), length))
        good = [length for length in nearest if 0.7 * want <= length <= 1.4 * want]
        rounded = want if want == most else want // ratio * ratio
        allowed = [rounded] if rounded >= max(1, least) else []
        plain = [length for length in allowed if self._leaves_room(length, least, partial)]
        return good + plain + [length for length in nearest if length not in good] + allowed

    def _tail(self, gap: int, full: int, ratio: int) -> int:
        """Tokens of a last window that fills `gap` row tokens, in whole blocks."""
        tokens = gap - (self.geometry.overlap if full else 0)
        if self.geometry.pooling == "eos":
            tokens = tokens * ratio // (ratio + 1)
        return max(0, min(tokens, self.geometry.window) // ratio * ratio)

    def _leaves_room(self, length: int, least: int, partial: Sequence[int]) -> bool:
        """Whether the last window leaves its row either full or with room for another memory."""
        tail = length % self.geometry.window
        if not tail:
            return True
        gap = next((gap for gap in partial if gap >= tail), self.geometry.row_length)
        return gap - tail >= least or gap - tail < 4
