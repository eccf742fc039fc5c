"""Where a document may be cut: the token boundaries of a tokenizer, found piece by piece.

Pieces lie on a fixed grid of characters, so the boundaries depend on the document alone (not on where reading
began), and a document of any length costs only the pieces that are read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

PIECE = 8192
"""Characters of one piece."""
MARGIN = 256
"""Characters tokenised on each side of a piece and not used, so that its edges cut no token."""
_KEPT = 4


class Boundaries:
    """Token boundaries of one text. encode_with_offsets: as of ContentTokenizer, (ids, starts)."""

    def __init__(
        self, text: str, encode_with_offsets: Callable[[str], tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self.text, self._encode = text, encode_with_offsets
        self._pieces: OrderedDict[int, tuple[np.ndarray, np.ndarray, int]] = OrderedDict()

    def after(self, start: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Places to cut within the next `tokens` tokens after character `start`.

        Returns (characters, counts), int64: cutting at characters[i] takes counts[i] tokens; both increase.
        The end of the text is among them when it is reached; at least one place is (the first, however far).
        """
        length, number, base = len(self.text), start // PIECE, 0
        places: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        while number * PIECE < length and (base <= tokens or not places):
            chars, ordinals, total = self._piece(number)
            beyond = int(np.searchsorted(chars, start, side="right"))
            if number == start // PIECE:
                first = int(np.searchsorted(chars, start))
                base = -(int(ordinals[first]) if first < len(ordinals) else total)
            last = int(np.searchsorted(ordinals, tokens - base, side="right"))
            last = max(last, beyond if places else min(beyond + 1, len(chars)))
            if last > beyond:
                places.append(chars[beyond:last])
                counts.append(ordinals[beyond:last] + base)
            base += total
            number += 1
        if base <= tokens or not places:
            places.append(np.array([length]))
            counts.append(np.array([max(base, 1)]))
        if len(places) == 1:
            return places[0], counts[0]
        return np.concatenate(places), np.concatenate(counts)

    def rest(self, start: int, at_most: int) -> int:
        """Tokens from `start` to the end of the text, or more than `at_most` if there are more than that."""
        characters, counts = self.after(start, at_most)
        return int(counts[-1]) if characters[-1] == len(self.text) else at_most + 1

    def _piece(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(boundaries in the piece, tokens of the piece before each, tokens of the piece)."""
        if number in self._pieces:
            self._pieces.move_to_end(number)
            return self._pieces[number]
        begin, end = number * PIECE, min((number + 1) * PIECE, len(self.text))
        low, high = max(0, begin - MARGIN), min(len(self.text), end + MARGIN)
        starts = self._encode(self.text[low:high])[1] + low
        inside = starts < low
        where = np.maximum.accumulate(np.where(inside, low, starts))
        owned = (where >= begin) & (where < end)
        ordinals = np.flatnonzero(owned & ~inside)
        first = int(np.argmax(owned)) if owned.any() else 0
        chars, unique = np.unique(starts[ordinals], return_index=True)
        piece = chars, ordinals[unique] - first, int(owned.sum())
        self._pieces[number] = piece
        if len(self._pieces) > _KEPT:
            self._pieces.popitem(last=False)
        return piece
