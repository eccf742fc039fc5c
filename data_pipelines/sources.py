"""Sources: where documents come from. datatrove's readers, with every row that is left out counted by
reason."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import orjson
from datatrove.data import Document
from datatrove.pipeline.readers import HuggingFaceDatasetReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader, BaseReader

from lclm.data.shards import check_messages, message_text

from .settings import SourceSettings

ALWAYS_SKIPPED = ("site-packages/*", "dist-packages/*", "__pycache__/*", "*/__pycache__/*")
SUFFIXES = {
    "text": ("*",),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.json", "*.jsonl.zst"),
    "parquet": ("*.parquet",),
    "stdlib": ("*.py",),
}


@dataclass
class Inputs:
    """What a source will read: files below `root`, and a stamp that changes when they do."""

    name: str
    root: str
    files: list[str] = field(default_factory=list)
    stamp: str = ""
    dropped: dict[str, int] = field(default_factory=dict)


def find_inputs(name: str, source: SourceSettings) -> Inputs:
    """List the files of a source (for huggingface: resolve the dataset).

    :raises ValueError: nothing there; the message names the source and its path.
    """
    if source.kind == "huggingface":
        return _find_dataset(name, source)
    path = sysconfig.get_paths()["stdlib"] if source.kind == "stdlib" else str(source.path)
    fs, root = fsspec.url_to_fs(path)
    try:
        if not fs.exists(root):
            raise FileNotFoundError(path)
        found = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
    except (OSError, ImportError) as error:
        raise ValueError(
            f"source {name}: cannot read {path}: {error}; correct sources.{name}.path"
        ) from error
    folder = root.rpartition("/")[0] if root in found else root
    kept, dropped = _choose(source, {file[len(folder) + 1 :]: info for file, info in found.items()})
    if not kept:
        wanted = ", ".join(source.include or SUFFIXES[source.kind])
        raise ValueError(
            f"source {name}: none of the {len(found)} files in {path} is wanted (include: {wanted}; "
            f"exclude: {', '.join(source.exclude) or 'nothing'}); correct sources.{name}"
        )
    times = source.kind != "stdlib"
    lines = [f"{file} {info['size']} {info.get('mtime', '') if times else ''}" for file, info in kept.items()]
    stamp = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if source.kind == "stdlib":
        stamp += f" python {platform.python_version()}"
    url = fs.unstrip_protocol(folder) if "://" in path or "::" in path else folder
    return Inputs(name, url, list(kept), stamp, dropped)


def _choose(source: SourceSettings, found: dict[str, dict]) -> tuple[dict[str, dict], dict[str, int]]:
    """The files wanted, in order of name, and how many were left out by reason."""
    kept, dropped = {}, Counter[str]()
    include = source.include or SUFFIXES[source.kind]
    for file, info in sorted(found.items()):
        always = source.kind == "stdlib" and _matches(file, ALWAYS_SKIPPED)
        if always or not (_matches(file, include) or len(found) == 1):
            continue
        if _matches(file, source.exclude):
            dropped["excluded files"] += 1
        elif source.max_file_bytes is not None and info["size"] > source.max_file_bytes:
            dropped["files over max_file_bytes"] += 1
        else:
            kept[file] = info
    if source.max_files is not None and len(kept) > source.max_files:
        dropped["files over max_files"] += len(kept) - source.max_files
        by_hash = sorted(kept, key=lambda file: hashlib.sha256(file.encode()).digest())
        kept = {file: kept[file] for file in sorted(by_hash[: source.max_files])}
    return kept, dict(dropped)


def _matches(file: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _find_dataset(name: str, source: SourceSettings) -> Inputs:
    from datasets import load_dataset_builder

    options = {key: value for key, value in source.options.items() if key != "split"}
    if "split" not in source.options:
        raise ValueError(f"source {name}: name the split, such as sources.{name}.options: {{split: train}}")
    try:
        builder = load_dataset_builder(str(source.path), **options)
    except Exception as error:  # whatever the hub, the network or the dataset raises
        raise ValueError(
            f"source {name}: datasets cannot load {source.path!r}: {str(error).splitlines()[0]}. Correct "
            f"sources.{name}.path and options, or check the network (a local folder needs none)"
        ) from error
    return Inputs(name, str(source.path), stamp=f"{builder.config_id} {builder.hash}")


def make_reader(name: str, source: SourceSettings, inputs: Inputs, files_list: str) -> BaseReader:
    """The datatrove reader of a source; `files_list` is a file with one relative path a line."""
    limit = -1 if source.max_documents is None else source.max_documents
    common: dict[str, Any] = {"source": name, "messages_key": source.messages_key, "limit": limit}
    tables = common | {"text_key": source.text_key, "id_key": source.id_key}
    if source.kind == "huggingface":
        return HubRows(inputs.root, dataset_options=source.options, streaming=True, **tables)
    if source.kind == "jsonl":
        return JsonLines(inputs.root, paths_file=files_list, **tables)
    if source.kind == "parquet":
        return ParquetRows(inputs.root, paths_file=files_list, **tables)
    return TextFiles(inputs.root, paths_file=files_list, **common)


class Counted(BaseReader):
    """Turns a row into a Document and counts what cannot be one.

    The document's metadata hold ``source``, ``path``, the row's other columns, and ``messages`` of a
    conversation, whose text is that of its messages.
    """

    def __init__(self, *args: Any, source: str, messages_key: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source, self.messages_key = source, messages_key

    def drop(self, reason: str) -> None:
        """Count one row that is left out."""
        self.stat_update(f"dropped_{self.source}: {reason}")

    def get_document_from_dict(self, data: Any, source_file: str, id_in_file: int | str) -> Document | None:
        if not isinstance(data, dict):
            self.drop("not a JSON object")
            return None
        data = dict(data)
        number = data.pop(self.id_key, None)
        path = source_file if id_in_file == "" else f"{source_file}/{id_in_file}"
        metadata: dict[str, Any] = {"source": self.source, "path": path}
        if number is not None:
            metadata["id"] = str(number)
        if self.messages_key:
            messages = data.pop(self.messages_key, None)
            try:
                check_messages(messages)
            except ValueError:
                self.drop("not a conversation")
                return None
            metadata["messages"], text = messages, "\n".join(message_text(messages))
        else:
            text = data.pop(self.text_key, None)
        problem = _problem(text)
        if problem:
            self.drop(problem)
            return None
        return Document(text, path, metadata=plain(data) | metadata)


class TextFiles(Counted, BaseDiskReader):
    """One file of UTF-8 text is one document."""

    name = "📄 Text files"

    def read_file(self, filepath: str) -> Iterator[Document]:
        try:
            with self.data_folder.open(filepath, "rb", compression="infer") as file:
                text = file.read().decode()
        except UnicodeDecodeError:
            self.drop("invalid UTF-8")
            return
        document = self.get_document_from_dict({"text": text}, filepath, "")
        if document:
            yield document


class JsonLines(Counted, BaseDiskReader):
    """One line is one document."""

    name = "🐿 JSON lines"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb", compression="infer") as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    row = orjson.loads(line.decode())
                except UnicodeDecodeError:
                    self.drop("invalid UTF-8")
                    continue
                except orjson.JSONDecodeError:
                    self.drop("wrong JSON")
                    continue
                document = self.get_document_from_dict(row, filepath, number)
                if document:
                    yield document


class ParquetRows(Counted, ParquetReader):
    """One row is one document."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        from pyarrow import ArrowException

        try:
            yield from super().read_file(filepath)
        except (ArrowException, OSError) as error:
            raise ValueError(
                f"source {self.source}: {filepath} is no readable Parquet file: "
                f"{str(error).splitlines()[0]}. Copy it again, or leave it out with `exclude:`"
            ) from error


class HubRows(Counted, HuggingFaceDatasetReader):
    """One row of a Hugging Face dataset is one document."""


def _problem(text: Any) -> str | None:
    """Why `text` cannot be a document's text, or None."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return "empty"
    if not isinstance(text, str):
        return "text is not a string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "invalid UTF-8"
    return None


def plain(value: Any) -> Any:
    """`value` as what JSON can hold: other objects become strings, infinite numbers null."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
