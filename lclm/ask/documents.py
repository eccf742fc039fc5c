"""Documents by file, folder, glob or standard input; unusable ones that are found are left out."""

from __future__ import annotations

import codecs
import glob
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ARTIFACT = ".lclm"
"""The ending of a file that holds a compressed document."""
MOST_BYTES = 64 * 2**20
"""Of one document."""
MOST_BYTES_TOGETHER = 256 * 2**20
MOST_DOCUMENTS = 10_000
"""Of one command: more is a folder named by mistake."""
_LOOKED_AT = 8192
_NAMED = 5


@dataclass(frozen=True)
class Document:
    """A text to be compressed, or the path of an artifact. name: the path as printable text."""

    name: str
    text: str | None = None
    artifact: Path | None = None


class Unusable(ValueError):
    """A document that cannot be read. reason: a few words, for the account of what is left out."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"{name}: {reason}; {remedy}")
        self.reason = reason


def find_documents(paths: Sequence[str], tell: Callable[[str], None] | None = None) -> list[Document]:
    """The documents that `paths` name: files, folders with all below them, globs, `-` for standard input.

    In the order of `paths`, sorted within each, none twice. A file that is named must be usable: ValueError
    or OSError if not. In folders and globs, what is hidden, binary, empty, not UTF-8, too large or unreadable
    is left out, and `tell` gets a line with how many and which; ValueError if nothing is left.
    """
    search = _Search()
    for path in dict.fromkeys(paths):
        search.add(path)
    if tell is not None and search.left_out:
        tell(_account(search.left_out))
    return search.documents


def printable(path: str | os.PathLike[str]) -> str:
    """A path to be shown: characters that do not print are escaped, bytes that are not UTF-8 too."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Search:
    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.left_out: dict[str, list[str]] = {}
        self._seen: set[tuple[int, int]] = set()
        self._bytes = 0

    def add(self, path: str) -> None:
        name = printable(path)
        if path == "-":
            self._keep(Document("standard input", _text("standard input", sys.stdin.buffer)), "-")
        elif os.path.isdir(path):
            self._add_found(name, [path])
        elif os.path.lexists(path):
            self._add_file(path, name)
        elif glob.has_magic(path):
            if not (found := sorted(glob.glob(path, recursive=True))):
                raise FileNotFoundError(f"{name}: no file matches")
            self._add_found(name, found)
        else:
            raise FileNotFoundError(f"{name}: there is no such file or folder")

    def _add_found(self, name: str, starts: Sequence[str]) -> None:
        """Files among `starts` and below them. ValueError if none can be used."""
        left_out: dict[str, list[str]] = {}
        usable = False
        for file, reason in _files(starts):
            try:
                if reason is None:
                    self._add_file(file, name)
                    usable = True
            except Unusable as error:
                reason = error.reason
            except OSError:
                reason = "unreadable"
            if reason is not None:
                left_out.setdefault(reason, []).append(printable(file))
        if not usable:
            why = f": {_account(left_out)}" if left_out else ""
            raise ValueError(f"{name}: holds no document that can be read{why}")
        for reason, files in left_out.items():
            self.left_out.setdefault(reason, []).extend(files)

    def _add_file(self, path: str, named: str) -> None:
        known = os.stat(path)
        if (known.st_dev, known.st_ino) not in self._seen:
            self._keep(_document(path), named)
            self._seen.add((known.st_dev, known.st_ino))

    def _keep(self, document: Document, named: str) -> None:
        self.documents.append(document)
        self._bytes += len(document.text or "")
        if len(self.documents) > MOST_DOCUMENTS:
            raise ValueError(f"{named}: makes more than {MOST_DOCUMENTS:,} documents; name fewer")
        if self._bytes > MOST_BYTES_TOGETHER:
            raise ValueError(f"{named}: makes more than {MOST_BYTES_TOGETHER >> 20} MiB of text; name less")


def _files(starts: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Files among `starts` and below them in sorted order, and why one (or a folder) is left out at sight.

    Links are followed; a folder is entered once, so that a loop of links ends.
    """
    entered: set[tuple[int, int]] = set()
    waiting = list(reversed(starts))
    while waiting:
        path = waiting.pop()
        try:
            known = os.stat(path)
            if not stat.S_ISDIR(known.st_mode):
                yield path, None if stat.S_ISREG(known.st_mode) else "no regular file"
            elif (known.st_dev, known.st_ino) not in entered:
                entered.add((known.st_dev, known.st_ino))
                names = sorted(os.listdir(path), reverse=True)
                waiting += [os.path.join(path, name) for name in names if not name.startswith(".")]
                for hidden in sorted(name for name in names if name.startswith(".")):
                    yield os.path.join(path, hidden), "hidden"
        except OSError:
            yield path, "unreadable"


def _document(path: str) -> Document:
    name = printable(path)
    if path.endswith(ARTIFACT):
        return Document(name, artifact=Path(path))
    with open(path, "rb") as file:
        return Document(name, _text(name, file))


def _text(name: str, file: BinaryIO) -> str:
    """The text of a UTF-8 file, without a byte order mark. Unusable when it is none, empty or too large."""
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Unusable(name, f"over {MOST_BYTES >> 20} MiB", "cut it into several documents")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Unusable(name, "not UTF-8 but UTF-16", "convert it, for example with iconv -f UTF-16 -t UTF-8")
    if b"\0" in content[:_LOOKED_AT]:
        raise Unusable(name, "binary", "give its text, for example with pdftotext or pandoc")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(
            name, "not UTF-8 text", f"see byte {error.start}; convert it, for example with iconv -t UTF-8"
        ) from None
    if not text.strip():
        raise Unusable(name, "empty", "give a document that holds text")
    return text


def _account(left_out: dict[str, list[str]]) -> str:
    """`left out 2 hidden (.git, .env), 1 binary (logo.png)`."""
    groups = []
    for reason, files in left_out.items():
        more = f", … {len(files) - _NAMED} more" if len(files) > _NAMED else ""
        groups.append(f"{len(files):,} {reason} ({', '.join(files[:_NAMED])}{more})")
    return f"left out {', '.join(groups)}"
