"""What a data set keeps in memory: the manifest's shards as columns, and the pages of indexes last read."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np

PAGE = 512
"""Rows of an index that are read and kept together."""
PAGES = 64
"""Pages kept: 1 MiB."""
HEADER = 128
"""Bytes of the header that numpy writes before an array of this kind."""
COLUMNS = 4
_ROW = 8 * COLUMNS


class BadIndex(Exception):
    """What is wrong with an index."""


@dataclass(frozen=True)
class Shard:
    """One line of the manifest's ``shards``. Sizes are in bytes, checksums are hexadecimal SHA-256."""

    file: str
    samples: int
    bytes: int
    text_bytes: int
    sha256: str
    index: str
    index_sha256: str


class Shards(Sequence[Shard]):
    """The shards of a manifest. Columns, since 100,000 shards as objects take five times the memory."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """:raises KeyError, TypeError: a row lacks an entry, or one is of the wrong type."""
        self._columns: dict[str, np.ndarray] = {}
        rows = list(rows)
        for item in fields(Shard):
            values = [row[item.name] for row in rows]
            if item.type == "int":
                self._columns[item.name] = np.array(values, np.int64)
            else:
                self._columns[item.name] = np.array([str.encode(value) for value in values], np.bytes_)

    @property
    def samples(self) -> np.ndarray:
        """Samples of each shard, int64 [shards]."""
        return self._columns["samples"]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[place] for place in range(len(self))[number]]
        values: dict[str, Any] = {name: column[number].item() for name, column in self._columns.items()}
        values |= {name: value.decode() for name, value in values.items() if isinstance(value, bytes)}
        return Shard(**values)

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))


class IndexPages:
    """Rows of the shards' indexes, read by pages.

    fetch: (file, first byte, byte after the last) to bytes. BadIndex if an index is not int64 [samples, 4].
    """

    def __init__(self, fetch: Callable[[str, int, int], bytes]) -> None:
        self._fetch = fetch
        self._pages: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def rows(self, file: str, samples: int, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of an index of `samples` rows, int64 [stop - start, 4]."""
        numbers = range(start // PAGE, -(-stop // PAGE))
        if start >= stop:
            return np.zeros((0, COLUMNS), np.int64)
        pages = [self._page(file, samples, number) for number in numbers]
        first = numbers[0] * PAGE
        return (pages[0] if len(pages) == 1 else np.concatenate(pages))[start - first : stop - first]

    def _page(self, file: str, samples: int, number: int) -> np.ndarray:
        key = file, number
        if key not in self._pages:
            first, last = number * PAGE, min(samples, (number + 1) * PAGE)
            begin = HEADER + first * _ROW if number else 0
            data = self._fetch(file, begin, HEADER + last * _ROW)
            if not number:
                _check_header(data, samples)
                data = data[HEADER:]
            if len(data) != (last - first) * _ROW:
                raise BadIndex(f"cut short at row {first + len(data) // _ROW}")
            self._pages[key] = np.frombuffer(data, "<i8").reshape(-1, COLUMNS)
            if len(self._pages) > PAGES:
                self._pages.popitem(last=False)
        self._pages.move_to_end(key)
        return self._pages[key]


def _check_header(data: bytes, samples: int) -> None:
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise BadIndex(str(error)) from error
    if dtype != np.int64 or shape != (samples, COLUMNS) or by_columns or file.tell() != HEADER:
        raise BadIndex(f"{dtype} {list(shape)}, not int64 [{samples}, {COLUMNS}]")
