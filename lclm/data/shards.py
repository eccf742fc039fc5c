"""Data sets on disk: webdataset shards with an index for byte-range reads and a manifest.

A data set is one folder (any fsspec URL) that holds one split of one product:

- ``shard-00000.tar``: a plain tar in webdataset's form. A *documents* sample is ``KEY.json`` (metadata) and
  ``KEY.txt`` (UTF-8 text); a *conversations* sample is ``KEY.json`` = ``{"messages": [...], "meta": {...}}``.
- ``shard-00000.npy``: its index, int64 [samples, 4]; a row is (byte offset of the sample's first tar header,
  bytes to the next sample, bytes of text, CRC-32 of that byte range).
- ``manifest.json``: shards, counts, checksums, sources and licences, what was dropped and why, fingerprint.

Nothing here knows tokenizers or models.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import re
import secrets
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import fsspec
import numpy as np

from lclm.data.index import BadIndex, IndexPages, Shard, Shards
from lclm.data.reading import (
    BAD_INDEX,
    CHECKSUM,
    CUT_SHORT,
    MISSING,
    NO_INDEX,
    UNREADABLE,
    UNUSABLE,
    Damaged,
    Reader,
)
from lclm.data.settings import ReadingSettings

SCHEMA = 1
MANIFEST = "manifest.json"
KINDS = ("documents", "conversations")
Kind = Literal["documents", "conversations"]

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_/-]{0,89}")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Sample:
    """One document (``text``) or one conversation (``messages``)."""

    key: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def check_messages(messages: Any) -> None:
    """Raise ``ValueError`` unless `messages` is a conversation.

    That is a non-empty list of ``{"role", "content"}`` where the content is a string or a list of parts
    ``{"type": "text" | "memory", "text": str, "ratio"?: int}``; a memory is not empty.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a non-empty list, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} must be an object with a role")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise ValueError(f"message {i}: content must be a string or a list of parts")
        for part in content:
            known = isinstance(part, dict) and part.get("type") in ("text", "memory")
            if not known or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"message {i}: a part is {{type: text or memory, text: ...}}, not {part!r:.80}"
                )
            if part["type"] == "memory" and not part["text"]:
                raise ValueError(f"message {i}: a memory part has no text")


def message_text(messages: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Every piece of text of a conversation, in order."""
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def fingerprint(kind: str, shards: Iterable[Shard]) -> str:
    """32 hex digits that stand for the samples and their order, wherever the files lie."""
    lines = [f"{SCHEMA} {kind}"] + [f"{shard.samples} {shard.sha256}" for shard in shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


class _HashingFile:
    """A write-only file that counts and hashes what passes."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)


class ShardWriter:
    """Write samples to shards ``{prefix}-00000.tar`` and on, each at most about `max_bytes` long.

    A shard is written under a temporary name and renamed when complete, its index first. The same samples in
    the same order give the same bytes. As a context manager, ``shards`` then lists what was written; leaving
    with an exception removes the unfinished shard.

    :raises ValueError: a malformed key, an empty text, a conversation that is none, or a full disk.
    """

    def __init__(self, folder: str, *, kind: Kind, max_bytes: int = 1 << 28, prefix: str = "shard") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        self.fs, self.path = fsspec.url_to_fs(str(folder))
        self.kind, self.max_bytes, self.prefix = kind, max_bytes, prefix
        self.shards: list[Shard] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self._file: Any = None
        self._keys: set[str] = set()
        self._unfinished = f"{secrets.token_hex(4)}.tmp"

    def write(self, sample: Sample) -> None:
        """Append one sample. Keys must be unique within the writer and match ``[A-Za-z0-9_/-]{1,90}``."""
        data, text_bytes = self._encode(sample)
        with self._space(self._name):
            if self._file is not None and self._hashing.bytes + len(data) > self.max_bytes:
                self._finish()
            if self._file is None:
                self._start()
            offset = self._hashing.bytes
            self._hashing.write(data)
        self._rows.append((offset, len(data), text_bytes, zlib.crc32(data)))
        self._keys.add(sample.key)

    def _encode(self, sample: Sample) -> tuple[bytes, int]:
        from webdataset.writer import TarWriter

        if not _KEY.fullmatch(sample.key):
            raise ValueError(f"sample key {sample.key!r}: use at most 90 of A-Z a-z 0-9 _ - / (no dots)")
        if sample.key in self._keys:
            raise ValueError(f"sample key {sample.key!r} is written twice")
        members: dict[str, Any] = {"__key__": sample.key}
        try:
            if self.kind == "documents":
                if not sample.text or sample.messages is not None:
                    raise ValueError("a document needs text that is not empty, and no messages")
                members |= {"txt": sample.text.encode(), "json": _dump(sample.meta)}
                text_bytes = len(members["txt"])
            else:
                check_messages(sample.messages)
                assert sample.messages is not None
                members["json"] = _dump({"messages": sample.messages, "meta": sample.meta})
                text_bytes = sum(len(text.encode()) for text in message_text(sample.messages))
        except (ValueError, TypeError) as error:
            raise ValueError(f"sample {sample.key}: {error}") from error
        buffer = io.BytesIO()
        writer = TarWriter(buffer, encoder=False, mtime=0, user="lclm", group="lclm", mode=0o644)
        writer.write(members)
        length = writer.tarstream.offset
        writer.close()
        return buffer.getvalue()[:length], text_bytes

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{len(self.shards):05d}"

    def _start(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)
        self._file = self.fs.open(f"{self.path}/{self._name}.tar.{self._unfinished}", "wb")
        self._hashing = _HashingFile(self._file)

    def _finish(self) -> None:
        """Complete the open shard: end-of-archive blocks, index, then both renamed into place."""
        name = self._name
        end = self._hashing.bytes + 2 * tarfile.BLOCKSIZE
        self._hashing.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.close()
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 4)
        buffer = io.BytesIO()
        np.save(buffer, rows)
        self.fs.pipe_file(f"{self.path}/{name}.npy.{self._unfinished}", buffer.getvalue())
        for suffix in ("npy", "tar"):
            self.fs.mv(f"{self.path}/{name}.{suffix}.{self._unfinished}", f"{self.path}/{name}.{suffix}")
        self.shards.append(
            Shard(
                file=f"{name}.tar",
                samples=len(rows),
                bytes=self._hashing.bytes,
                text_bytes=int(rows[:, 2].sum()),
                sha256=self._hashing.sha256.hexdigest(),
                index=f"{name}.npy",
                index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
            )
        )
        self._rows, self._file = [], None

    @contextlib.contextmanager
    def _space(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            if error.errno not in _OUT_OF_SPACE:
                raise
            raise ValueError(
                f"no space left while writing {self.path}/{name}.tar: {error.strerror}. The unfinished shard "
                "was removed. Free space there or choose another folder, then run the same command again."
            ) from error

    def close(self) -> list[Shard]:
        """Complete the open shard, if any; returns all shards."""
        with self._space(self._name):
            if self._file is not None:
                self._finish()
        return self.shards

    def abort(self) -> None:
        """Remove the unfinished shard; the completed ones stay."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file, name = None, self._name
        for suffix in ("tar", "npy"):
            with contextlib.suppress(OSError):
                self.fs.rm_file(f"{self.path}/{name}.{suffix}.{self._unfinished}")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


def write_manifest(
    folder: str, *, name: str, kind: Kind, split: str, shards: list[Shard], **more: Any
) -> dict[str, Any]:
    """Write ``manifest.json`` (temporary name, then renamed), which makes `folder` a data set; returns it.

    :param more: further entries: ``tokens`` ({tokenizer: count}), ``sources``, ``pipeline``, ``dropped``.
    """
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "kind": kind,
        "split": split,
        "fingerprint": fingerprint(kind, shards),
        "samples": sum(shard.samples for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "text_bytes": sum(shard.text_bytes for shard in shards),
        "shards": [asdict(shard) for shard in shards],
        "tokens": {},
        "sources": [],
        "pipeline": {},
        "dropped": {},
    } | more
    fs, path = fsspec.url_to_fs(str(folder))
    fs.makedirs(path, exist_ok=True)
    data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    fs.pipe_file(f"{path}/{MANIFEST}.tmp", data)
    fs.mv(f"{path}/{MANIFEST}.tmp", f"{path}/{MANIFEST}")
    return manifest


class DataSet:
    """A data set opened for reading. Holds no open file, so it can be pickled to loader workers.

    ``runs`` and ``run`` number the contiguous runs of samples that lanes take; ``read`` fetches samples of
    one shard in one byte-range request.
    """

    def __init__(self, url: str, manifest: dict[str, Any], reader: Reader | None = None) -> None:
        """manifest: as in ``manifest.json``; kept without its ``shards``, which become `self.shards`."""
        self.url = url
        self.kind: Kind = manifest["kind"]
        self.fingerprint: str = manifest["fingerprint"]
        self.shards = Shards(manifest["shards"])
        self.manifest = {name: value for name, value in manifest.items() if name != "shards"}
        self.num_samples = int(self.shards.samples.sum())
        self._reader = reader or Reader(url)
        self._pages = IndexPages(self._fetch_index)
        self._ends_of_runs: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, url: str, settings: ReadingSettings | None = None) -> DataSet:
        """Read the manifest of the data set in folder `url`. settings: how often reads are tried.

        :raises ValueError: no manifest there, one that is damaged, unreadable, or of another schema.
        """
        url = str(url).rstrip("/")
        reader = Reader(url, settings)
        try:
            manifest, problem = reader.read(MANIFEST, None, None, _parse_json)
        except FileNotFoundError as error:
            raise ValueError(_no_manifest(url)) from error
        except OSError as error:
            raise ValueError(f"{error}; see that its store can be reached from this machine") from error
        if problem is not None:
            raise ValueError(f"{url}/{MANIFEST} is damaged ({problem}): build the data set again")
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"{url}/{MANIFEST} has schema {schema!r}, this version reads {SCHEMA}: build the data set "
                "again with this version of lclm, or read it with the version that wrote it"
            )
        try:
            return cls(url, manifest, reader)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{url}/{MANIFEST} is incomplete ({error}): build the data set again") from error

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.shards.samples)

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, place in the shard) of the data set's `sample`-th sample."""
        if not 0 <= sample < self.num_samples:
            raise ValueError(f"{self.url} has samples 0 to {self.num_samples - 1}, not {sample}")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, int(sample - (self._ends[shard] - self.shards.samples[shard]))

    def runs(self, run_samples: int) -> int:
        """How many runs of at most `run_samples` contiguous samples there are; a run never crosses shards."""
        ends = self._run_ends(run_samples)
        return int(ends[-1]) if len(ends) else 0

    def run(self, number: int, run_samples: int) -> tuple[int, int, int]:
        """(shard, start, stop) of run `number`, to be given to ``read``. All are found equally fast."""
        ends = self._run_ends(run_samples)
        if not 0 <= number < self.runs(run_samples):
            raise ValueError(
                f"{self.url} has {self.runs(run_samples)} runs of {run_samples}, no run {number}"
            )
        shard = int(np.searchsorted(ends, number, side="right"))
        samples = int(self.shards.samples[shard])
        start = (number - int(ends[shard]) + -(-samples // run_samples)) * run_samples
        return shard, start, min(samples, start + run_samples)

    def _run_ends(self, run_samples: int) -> np.ndarray:
        """Runs up to the end of each shard."""
        if run_samples not in self._ends_of_runs:
            self._ends_of_runs[run_samples] = np.cumsum(-(-self.shards.samples // run_samples))
        return self._ends_of_runs[run_samples]

    def index(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a shard's index, int64 [rows, 4]: offset, bytes, text's bytes, CRC-32."""
        samples = int(self.shards.samples[shard])
        file = self.shards[shard].index
        try:
            return self._pages.rows(file, samples, start, samples if stop is None else min(samples, stop))
        except BadIndex as error:
            raise self._damaged(file, str(error), BAD_INDEX) from error

    def text_bytes(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes of text of samples `start` to `stop` of a shard, int64 [samples]."""
        return self.index(shard, start, stop)[:, 2]

    def read(self, shard: int, start: int, stop: int) -> list[Sample]:
        """Samples `start` to `stop` (not included) of a shard, by one byte-range request.

        :raises ValueError: a shard that is missing, cut short or damaged; the message names file and sample.
        """
        samples = []
        for item in self.read_each(shard, start, stop):
            if isinstance(item, Damaged):
                raise item
            samples.append(item)
        return samples

    def read_each(self, shard: int, start: int, stop: int) -> list[Sample | Damaged]:
        """The same, with what is wrong in the place of every sample that cannot be used."""
        stop = min(stop, int(self.shards.samples[shard]))
        if start >= stop:
            return []
        try:
            rows = self.index(shard, start, stop)
        except Damaged as problem:
            return [problem] * (stop - start)
        entry = self.shards[shard]
        ends = rows[:, 0] + rows[:, 1]
        inside = (rows[:, 0] >= 0) & (rows[:, 1] > 0) & (rows[:, 1] <= entry.bytes) & (ends <= entry.bytes)
        if inside.all() and (rows[1:, 0] == ends[:-1]).all():
            return self._read_rows(entry.file, rows, start)
        found: list[Sample | Damaged] = []
        for place, (row, fits) in enumerate(zip(rows, inside, strict=True), start):
            if fits:
                found += self._read_rows(entry.file, row[None], place)
            else:
                found.append(self._damaged(entry.index, f"wrong place of sample {place}", BAD_INDEX))
        return found

    def _read_rows(self, name: str, rows: np.ndarray, start: int) -> list[Sample | Damaged]:
        """Neighbouring samples from the one numbered `start` on, by one request."""
        first, end = int(rows[0, 0]), int(rows[-1, 0] + rows[-1, 1])

        def parse(data: bytes) -> tuple[list[Sample | Damaged], bool]:
            found = [
                self._examine(data, name, place, offset - first, size, crc)
                for place, (offset, size, _, crc) in enumerate(rows.tolist(), start)
            ]
            return found, not any(isinstance(item, Damaged) for item in found)

        try:
            return self._reader.read(name, first, end, parse)
        except FileNotFoundError:
            return [self._missing(name, MISSING)] * len(rows)
        except OSError as error:
            return [Damaged(str(error), UNREADABLE, f"{self.url}/{name}")] * len(rows)

    def _examine(
        self, data: bytes, name: str, place: int, offset: int, size: int, crc: int
    ) -> Sample | Damaged:
        record = data[offset : offset + size]
        if len(record) < size:
            return self._damaged(name, f"cut short at sample {place}", CUT_SHORT)
        if zlib.crc32(record) != crc:
            return self._damaged(name, f"wrong CRC-32 of sample {place}", CHECKSUM)
        try:
            return self._decode(record, name, place)
        except Damaged as problem:
            return problem

    def _decode(self, record: bytes, name: str, place: int) -> Sample:
        members, key = {}, ""
        try:
            with tarfile.open(fileobj=io.BytesIO(record), mode="r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    file = tar.extractfile(member)
                    assert file is not None
                    members[suffix] = file.read()
            meta = json.loads(members["json"])
            if self.kind == "documents":
                return Sample(key, text=members["txt"].decode(), meta=meta)
            return Sample(key, messages=meta["messages"], meta=meta["meta"])
        except (tarfile.TarError, KeyError, ValueError, TypeError) as error:
            what = f"sample {place} ({key or 'no key'}) is not a {self.kind} sample"
            raise self._damaged(name, what, UNUSABLE) from error

    def __iter__(self) -> Iterator[Sample]:
        for shard in range(len(self.shards)):
            for start in range(0, self.shards[shard].samples, 256):
                yield from self.read(shard, start, start + 256)

    def undamaged(self) -> Iterator[Sample]:
        """All samples that can be used, in order; the others are left out."""
        for shard, samples in enumerate(self.shards.samples.tolist()):
            for start in range(0, samples, 256):
                found = self.read_each(shard, start, start + 256)
                yield from (item for item in found if not isinstance(item, Damaged))

    def _fetch_index(self, name: str, start: int, end: int) -> bytes:
        try:
            return self._reader.read(name, start, end, lambda data: (data, len(data) == end - start))
        except FileNotFoundError as error:
            raise self._missing(name, NO_INDEX) from error
        except OSError as error:
            raise Damaged(str(error), UNREADABLE, f"{self.url}/{name}") from error

    def _missing(self, name: str, reason: str) -> Damaged:
        return Damaged(
            f"{self.url}/{name} is missing but its manifest names it: copy the data set again with all its "
            "files, or build it again",
            reason,
            f"{self.url}/{name}",
        )

    def _damaged(self, name: str, what: str, reason: str) -> Damaged:
        return Damaged(
            f"{self.url}/{name} is damaged: {what}. `lclm data verify {self.url}` says which files differ "
            "from the manifest; copy them again from a good place, or build the data set again.",
            reason,
            f"{self.url}/{name}",
        )


def _parse_json(data: bytes) -> tuple[tuple[Any, ValueError | None], bool]:
    try:
        return (json.loads(data), None), True
    except ValueError as error:
        return (None, error), False


def _no_manifest(url: str) -> str:
    fs, path = fsspec.url_to_fs(url)
    with contextlib.suppress(Exception):  # a server that cannot list, or is gone
        below = sorted(fs.glob(f"{path}/*/{MANIFEST}") + fs.glob(f"{path}/*/*/{MANIFEST}"))
        if below:
            names = ", ".join(url + name[len(path) : -len(MANIFEST) - 1] for name in below[:6])
            return f"{url} has no {MANIFEST}, but data sets lie below it: name one of {names}"
    return (
        f"{url} is not a data set: it has no {MANIFEST}. Build one with `lclm data build RECIPE`, or give "
        "the folder of one split, such as data/stdlib/documents/train"
    )
