"""Reading bytes that may be damaged, or that come from afar: retries, a time limit, what is wrong."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from lclm.data.settings import ReadingSettings

T = TypeVar("T")

MISSING = "shard missing"
CUT_SHORT = "shard cut short"
CHECKSUM = "wrong checksum"
UNUSABLE = "not a sample"
UNREADABLE = "shard unreadable"
NO_INDEX = "index missing"
BAD_INDEX = "index damaged"
REASONS = (MISSING, CUT_SHORT, CHECKSUM, UNUSABLE, UNREADABLE, NO_INDEX, BAD_INDEX)
"""Why a sample cannot be used, as counted in "source: reason"."""
LONGEST_WAIT = 30.0
"""Seconds between two tries at most, before jitter."""
NAMED_FILES = 8
"""Files that a message names at most."""
LANE_LEAST, LANE_MOST = 64, 10_000
"""Samples that a lane may find damaged on its own before it asks whether to go on at all."""

_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_TRY_AGAIN = (408, 425, 429)
_BEYOND_THE_END = 416


class Damaged(ValueError):
    """A sample, or a part of a file, that cannot be used. `reason`: one of REASONS. `file`: its URL."""

    def __init__(self, message: str, reason: str, file: str) -> None:
        super().__init__(message)
        self.reason, self.file = reason, file

    def __reduce__(self) -> tuple[Any, ...]:
        return Damaged, (str(self), self.reason, self.file)


class Reader:
    """Reads ranges of files below one URL, again where that may help. Can be pickled.

    Errors are tried again with growing pauses; bytes that are found damaged as often if they come from
    afar, once where they are local. After a read that failed for good, the next ones are tried once, until
    one succeeds: a store that is down does not cost every read its full time.
    """

    def __init__(self, url: str, settings: ReadingSettings | None = None) -> None:
        self.url, self.settings = url, settings or ReadingSettings()
        self._down = False

    def read(
        self,
        name: str,
        start: int | None,
        end: int | None,
        parse: Callable[[bytes], tuple[T, bool]],
    ) -> T:
        """What `parse` makes of bytes `start` to `end` of a file; it says whether they were whole.

        Bytes that are not whole after all tries are taken as they are. FileNotFoundError; OSError with what
        the last try ended with; ValueError for a server without byte ranges.
        """
        fs, path = fsspec.url_to_fs(self.url)
        local = isinstance(fs, LocalFileSystem)
        for tried in itertools.count():
            problem: Exception | None = None
            try:
                data = self._once(fs, f"{path}/{name}", start, end)
            except _GONE as error:
                raise FileNotFoundError(f"{self.url}/{name}") from error
            except Exception as error:  # every file system of fsspec has errors of its own
                problem = error
            else:
                if start is not None and end is not None and len(data) > end - start:
                    raise ValueError(
                        f"{self.url}: asked for {end - start:,} bytes of {name} from {start:,} on, the "
                        f"server sent {len(data):,}: it serves no byte ranges; use one that does, or a copy"
                    )
                value, whole = parse(data)
                if whole or tried >= self._retries(1 if local else None):
                    self._down = False
                    return value
            if problem is not None and (_is_final(problem) or tried >= self._retries()):
                self._down = True
                raise OSError(
                    f"{self.url}/{name} cannot be read ({_words(problem)}; tries: {tried + 1})"
                ) from problem
            if problem is not None or not local:
                time.sleep(pause(tried, self.settings.wait_seconds))
        raise AssertionError

    def _retries(self, most: int | None = None) -> int:
        retries = 0 if self._down else self.settings.retries
        return retries if most is None else min(retries, most)

    def _once(self, fs: Any, path: str, start: int | None, end: int | None) -> bytes:
        try:
            if not getattr(fs, "async_impl", False):
                return fs.cat_file(path, start=start, end=end)
            limit = self.settings.timeout_seconds
            return sync(fs.loop, fs._cat_file, path, start=start, end=end, timeout=limit)
        except Exception as error:
            if getattr(error, "status", None) == _BEYOND_THE_END:
                return b""
            raise


def pause(tried: int, seconds: float) -> float:
    """How long to wait after so many tries: doubled each time, up to a bound, give or take a half."""
    return min(LONGEST_WAIT, seconds * 2.0**tried) * random.SystemRandom().uniform(0.5, 1.5)


def _is_final(error: Exception) -> bool:
    """Whether an error will be the same when the read is tried again."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRY_AGAIN
    return isinstance(error, (PermissionError, TypeError, NotImplementedError))


def _words(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP status {status}"
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def count_damaged(dropped: Mapping[str, int]) -> int:
    """Samples among those counted as "source: reason" that were damaged."""
    return sum(damaged_only(dropped).values())


def damaged_only(dropped: Mapping[str, int]) -> dict[str, int]:
    """Those counts of "source: reason" whose reason is damage."""
    return {name: count for name, count in dropped.items() if name.rpartition(": ")[2] in REASONS}


def too_many(dropped: Mapping[str, int], read: int, files: Sequence[str], settings: ReadingSettings) -> str:
    """The message of a run that stops because more is damaged than it may leave out."""
    counts = damaged_only(dropped)
    listed = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    known = list(dict.fromkeys(files))
    more = f" and {len(known) - NAMED_FILES} more" if len(known) > NAMED_FILES else ""
    named = f" Files: {'; '.join(known[:NAMED_FILES])}{more}." if known else ""
    return (
        f"{sum(counts.values()):,} of {read:,} samples read so far could not be used ({listed}), more than "
        f"data.reading.max_skipped={settings.max_skipped} and "
        f"max_skipped_share={settings.max_skipped_share:g} allow.{named} `lclm data verify` names all files "
        "that differ from their manifest: copy them again from a good place and start the run again (it goes "
        "on from its newest checkpoint), or raise data.reading.max_skipped"
    )
