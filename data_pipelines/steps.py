"""The pipeline's own steps, beside datatrove's: word splitting, filters, the writer of shards, token
counts."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import random
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline import filters as datatrove_filters
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontConfig
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from lclm.data.shards import DataSet, Kind, Sample, ShardWriter, message_text
from lclm.settings import unknown_name

from .conversations import Function, functions, make_conversations
from .settings import FilterSettings, PipelineSettings

FILTERS = {
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "c4_quality": "C4QualityFilter",
    "c4_badwords": "C4BadWordsFilter",
    "fineweb_quality": "FineWebQualityFilter",
    "language": "LanguageFilter",
    "regex": "RegexFilter",
    "url": "URLFilter",
    "sampler": "SamplerFilter",
}


class PlainWords(WordTokenizer):
    """Words as runs of letters, digits and underscores. Needs no language model; the default of every
    filter."""

    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"[^.!?\n]+[.!?]*", text)]


class LengthFilter(BaseFilter):
    """Keeps documents of at least `min_bytes` and at most `max_bytes` bytes of UTF-8."""

    name = "📏 Length"

    def __init__(self, min_bytes: int = 1, max_bytes: int | None = None) -> None:
        super().__init__()
        self.min_bytes, self.max_bytes = min_bytes, max_bytes

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        size = len(doc.text.encode())
        if size < self.min_bytes:
            return False, "too short"
        if self.max_bytes is not None and size > self.max_bytes:
            return False, "too long"
        return True


def make_filter(name: str, settings: FilterSettings) -> PipelineStep:
    """The filter that a recipe names.

    :raises ValueError: unknown kind or option, or a package that the filter needs and that is not installed.
    """
    known = ("length", *FILTERS)
    if settings.kind not in known:
        raise ValueError(f"filters.{name}: {unknown_name('kind', settings.kind, known)}")
    found = LengthFilter if settings.kind == "length" else getattr(datatrove_filters, FILTERS[settings.kind])
    accepted = [
        p for p in inspect.signature(found.__init__).parameters if p not in ("self", "exclusion_writer")
    ]
    for option in settings.options:
        if option not in accepted:
            raise ValueError(f"filters.{name}.options: {unknown_name('option', option, accepted)}")
    options = dict(settings.options)
    if "language" in accepted:
        options.setdefault("language", PlainWords())
    try:
        return found(**options)
    except ImportError as error:
        raise ValueError(
            f"filters.{name} ({settings.kind}) needs a package that is missing: {error}"
        ) from error
    except TypeError as error:
        raise ValueError(f"filters.{name}.options: {error}") from error


class NgramIndex(PipelineStep):
    """Writes the hashes of every n-gram of the documents it reads, in the form of datatrove's
    decontamination filter.

    Stands for datatrove's own indexer, which reads its evaluation sets through lighteval only.
    """

    name = "🧬 N-gram index"
    type = "🦠 - DECONT"

    def __init__(self, folder: str, config: NGramsDecontConfig) -> None:
        super().__init__()
        self.folder, self.config = folder, config

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        hash_of, words = create_hash_func(self.config.hash_config), PlainWords()
        hashes: dict[str, set[int]] = {}
        for document in data:
            tokens = words.word_tokenize(simplify_text(document.text, self.config.norm_config))
            found = hashes.setdefault(document.metadata["source"], set())
            found.update(hash_of(" ".join(gram)) for gram in ngrams(tokens, self.config.n_grams))
            yield document
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        for name, found in hashes.items():
            array = np.array(sorted(found), dtype=self.config.hash_config.np_descr)
            array.tofile(Path(self.folder) / f"{name}.index.hashes")


def split_of(document: Document, settings: PipelineSettings) -> str:
    """`heldout` or `train`, by a hash of the content: equal documents always fall together."""
    digest = hashlib.sha256(f"{settings.split.salt}\n{document.text}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < settings.split.heldout * 2**64 else "train"


def key_of(document: Document) -> str:
    """A key that is readable and unique: source, a piece of the path, a hash of both."""
    source, path = document.metadata["source"], document.metadata["path"]
    readable = re.sub(r"[^A-Za-z0-9]+", "_", str(document.metadata.get("id", path)).removesuffix(".py"))[-32:]
    digest = hashlib.sha256(f"{source}\n{path}".encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', source)[:20]}/{readable.strip('_') or 'x'}-{digest}"


class WriteShards(PipelineStep):
    """Writes the products of each document to shards of its split, and a report of them when the task is
    complete.

    Shards are ``FOLDER/{documents,conversations}/{train,heldout}/part-{rank}-{n}.tar``; the report, which
    the assembling stage reads, is ``REPORTS/{rank}.json``.
    """

    name = "📦 webdataset shards"
    type = "💽 - WRITER"

    def __init__(self, folder: str, reports: str, settings: PipelineSettings) -> None:
        super().__init__()
        self.folder, self.reports, self.settings = folder, reports, settings

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        writers: dict[tuple[Kind, str], Shuffled] = {}
        with ExitStack() as stack:
            for document in data:
                self.stat_update("documents")
                split = split_of(document, self.settings)
                with self.track_time():
                    for kind, sample in self.products(document):
                        if (kind, split) not in writers:
                            writers[kind, split] = stack.enter_context(self._writer(kind, split, rank))
                        writers[kind, split].write(sample)
        shards = {
            f"{kind}/{split}": [asdict(s) for s in w.writer.shards] for (kind, split), w in writers.items()
        }
        report = Path(self.reports) / f"{rank:05d}.json"
        report.parent.mkdir(parents=True, exist_ok=True)
        unfinished = report.with_suffix(f".{secrets.token_hex(4)}.tmp")
        unfinished.write_text(json.dumps(shards))
        unfinished.rename(report)
        return iter(())

    def _writer(self, kind: Kind, split: str, rank: int) -> Shuffled:
        settings, folder = self.settings.shards, f"{self.folder}/{kind}/{split}"
        writer = ShardWriter(folder, kind=kind, max_bytes=settings.max_bytes, prefix=f"part-{rank:05d}")
        held = settings.shuffle_conversations if kind == "conversations" else 0
        return Shuffled(writer, held, random.Random(f"{self.settings.seed} {rank} {split}"))

    def products(self, document: Document) -> Iterator[tuple[Kind, Sample]]:
        """The samples that one document gives: itself, and conversations about it."""
        key, meta = key_of(document), dict(document.metadata)
        messages = meta.pop("messages", None)
        if messages is not None:
            yield "conversations", Sample(key, messages=messages, meta=meta)
            return
        if self.settings.documents:
            yield "documents", Sample(key, text=document.text, meta=meta)
        code: list[Function] | None = None
        for name, settings in sorted(self.settings.conversations.items()):
            if code is None and settings.kind in ("docstring", "parameters"):
                code = functions(document.text)
            rng = random.Random(f"{self.settings.seed} {name} {key}")
            for i, (messages, about) in enumerate(make_conversations(document.text, settings, rng, code)):
                label = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:12]
                more = {"source": meta["source"], "path": meta["path"], "task": name} | about
                yield "conversations", Sample(f"{key}-{label}-{i}", messages=messages, meta=more)


class Shuffled:
    """A shard writer before which up to `held` samples are kept and written in random order."""

    def __init__(self, writer: ShardWriter, held: int, rng: random.Random) -> None:
        self.writer, self.held, self.rng = writer, held, rng
        self.samples: list[Sample] = []

    def write(self, sample: Sample) -> None:
        """Keep the sample; once `held` are kept, one of them, at random, is written."""
        self.samples.append(sample)
        if len(self.samples) > self.held:
            place = self.rng.randrange(len(self.samples))
            self.samples[place], self.samples[-1] = self.samples[-1], self.samples[place]
            self.writer.write(self.samples.pop())

    def __enter__(self) -> Shuffled:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.writer.abort()
            return
        with self.writer:
            self.rng.shuffle(self.samples)
            for sample in self.samples:
                self.writer.write(sample)


_HELD: dict[str, int] = {}
"""Files that this process holds a lock of as long as it lives."""


class Presence(PipelineStep):
    """Holds a shared lock while its process lives, so that a build can wait for one that was killed."""

    name = "🔒 Presence"
    type = "🔒 - LOCK"

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if self.file not in _HELD:
            _HELD[self.file] = os.open(self.file, os.O_RDWR | os.O_CREAT)
            fcntl.lockf(_HELD[self.file], fcntl.LOCK_SH)
        return data


class ReadBack(PipelineStep):
    """Reads the documents that the same rank of an earlier stage wrote as ``FOLDER/{rank}.jsonl``."""

    name = "🐿 Documents read back"
    type = "📖 - READER"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        file = Path(self.folder) / f"{rank:05d}.jsonl"
        if file.exists():
            with open(file, "rb") as lines:
                for line in lines:
                    row = orjson.loads(line)
                    yield Document(row["text"], row["id"], metadata=row["metadata"])


class CountTokens(PipelineStep):
    """Counts tokens of the text in every shard, under one tokenizer; writes ``COUNTS/{rank}.json``."""

    name = "🔢 Tokens of shards"
    type = "🔢 - TOKENS"

    def __init__(self, folder: str, counts: str, tokenizer: str) -> None:
        super().__init__()
        self.folder, self.counts, self.tokenizer = folder, counts, tokenizer

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        from lclm.model.text import ContentTokenizer

        content = ContentTokenizer(load_backend(self.tokenizer))
        counts = Counter[str]()
        number = 0
        for place in sorted(path.parent for path in Path(self.folder).glob("*/*/manifest.json")):
            data_set = DataSet.open(str(place))
            for shard, entry in enumerate(data_set.shards):
                number += 1
                if number % world_size != rank:
                    continue
                for start in range(0, entry.samples, 64):
                    texts = [text for s in data_set.read(shard, start, start + 64) for text in texts_of(s)]
                    product = f"{place.parent.name}/{place.name}"
                    counts[product] += sum(map(len, content.encode_batch(texts)))
        Path(self.counts).mkdir(parents=True, exist_ok=True)
        (Path(self.counts) / f"{rank:05d}.json").write_text(json.dumps(counts))
        return iter(())


def texts_of(sample: Sample) -> list[str]:
    """All text of a sample: the document, or every part of every message."""
    return [sample.text] if sample.text is not None else list(message_text(sample.messages or []))


def load_backend(path: str) -> Any:
    """The fast tokenizer in a folder, in a `tokenizer.json` file, or of that name on the hub.

    :raises ValueError: there is none.
    """
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        return Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(path)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"no tokenizer.json at {path}: {error}; give a folder, a file or a hub name"
        ) from error
