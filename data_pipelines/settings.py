"""What a pipeline recipe says: sources, filters, products, split, executor. Each part is a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lclm.settings import unknown_name

from .tokenizers import TokenizerSettings

FILE_KINDS = ("text", "jsonl", "parquet")
SOURCE_KINDS = (*FILE_KINDS, "huggingface", "stdlib")
CONVERSATION_KINDS = ("needles", "docstring", "parameters", "next_line")
DEDUP_KINDS = ("exact", "minhash")
EXECUTOR_KINDS = ("local", "slurm", "ray")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {unknown_name('kind', value, known)}")


def _check_unused(settings: Any, where: str, used: Mapping[str, tuple[str, ...]], kind: str) -> None:
    """An option that only other kinds read must have its default value."""
    for option in fields(settings):
        kinds = used.get(option.name)
        default = option.default_factory() if callable(option.default_factory) else option.default
        if kinds and kind not in kinds and getattr(settings, option.name) != default:
            raise ValueError(
                f"{where} of kind {kind}: {option.name} has no effect (only {', '.join(kinds)} read it); "
                "remove it"
            )


@dataclass
class SourceSettings:
    """One source of documents, or of conversations where `messages_key` is set.

    kind: text (one file is one document) | jsonl | parquet | huggingface (a dataset by name, streamed) |
    stdlib (Python's own library files). path: file or folder, local or any fsspec URL; the dataset's name or
    a local folder for huggingface. include, exclude: patterns of file names, relative to path ("asyncio/*";
    * crosses folders). text_key, id_key: columns. messages_key: the column of conversations. options:
    further arguments of datasets.load_dataset, such as {name: ..., split: train}. max_files, max_file_bytes:
    limits. max_documents: per task of the executor. licence, note: what the manifest says about the source.
    """

    kind: str = "text"
    path: str | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    text_key: str = "text"
    id_key: str = "id"
    messages_key: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    max_files: int | None = None
    max_file_bytes: int | None = None
    max_documents: int | None = None
    licence: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        _check_choice("sources", self.kind, SOURCE_KINDS)
        if self.kind == "stdlib" and self.path is not None:
            raise ValueError("a source of kind stdlib finds its own path; remove `path:` or use kind: text")
        if self.kind != "stdlib" and not self.path:
            raise ValueError(f"a source of kind {self.kind} needs `path:`")
        files, tables = (*FILE_KINDS, "stdlib"), ("jsonl", "parquet", "huggingface")
        used: dict[str, tuple[str, ...]] = dict.fromkeys(
            ("include", "exclude", "max_files", "max_file_bytes"), files
        )
        used |= dict.fromkeys(("text_key", "id_key", "messages_key"), tables) | {"options": ("huggingface",)}
        _check_unused(self, "a source", used, self.kind)


@dataclass
class FilterSettings:
    """One filter. kind: `length` (min_bytes, max_bytes) or one of datatrove's, such as gopher_quality;
    `options` are its arguments."""

    kind: str = "length"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DedupSettings:
    """Duplicates among the documents. kind: exact | minhash; the rest is minhash's.

    Two documents of similarity s are found with probability 1 - (1 - s^hashes_per_bucket)^buckets; ngrams is
    the shingle's length in words. The defaults find most pairs above 0.75.
    """

    kind: str = "minhash"
    ngrams: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8

    def __post_init__(self) -> None:
        _check_choice("dedup", self.kind, DEDUP_KINDS)
        used = dict.fromkeys(("ngrams", "buckets", "hashes_per_bucket"), ("minhash",))
        _check_unused(self, "dedup", used, self.kind)


@dataclass
class DecontaminationSettings:
    """Documents that share `ngrams` words in a row with an evaluation set are dropped.

    evaluations: named sources whose texts are the evaluation sets.
    """

    ngrams: int = 12
    evaluations: dict[str, SourceSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("decontamination needs `evaluations:`, named sources of the evaluation sets")


@dataclass
class ConversationSettings:
    """Conversations made from documents, with answers that can be checked.

    kind: needles (facts planted in a piece of the document) | docstring | parameters | next_line (questions
    about Python source). per_document: how many at most of one document. per_kilobyte: how many per 1,000
    characters of it (at least one). context: least and most characters of the compressed piece, needles
    included. needles: least and most facts planted; ask: one (chosen at random) | all (one turn each).
    digits: of each value. keys: words to choose keys from. needle, question, answer: their wording, with
    {key} and {value}; for the other kinds {name} and {line}. uncompressed: share of conversations whose
    piece is given as plain text.
    """

    kind: str = "needles"
    per_document: int = 100
    per_kilobyte: float = 1.0
    context: list[int] = field(default_factory=lambda: [64, 200])
    needles: list[int] = field(default_factory=lambda: [1, 1])
    ask: str = "one"
    digits: int = 5
    keys: list[str] = field(default_factory=list)
    needle: str = "\nThe magic number for {key} is {value}.\n"
    question: str | None = None
    answer: str = "{value}"
    uncompressed: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("conversations", self.kind, CONVERSATION_KINDS)
        used = dict.fromkeys(("needles", "ask", "digits", "keys", "needle", "answer"), ("needles",))
        _check_unused(self, "conversations", used, self.kind)
        for name in ("context", "needles"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 1 <= low_high[0] <= low_high[1]:
                raise ValueError(f"conversations: {name} must be [least, most], at least 1, not {low_high}")
        if self.ask not in ("one", "all"):
            raise ValueError(f"conversations: ask must be one or all, not {self.ask!r}")
        if not 0 <= self.uncompressed <= 1:
            raise ValueError(
                f"conversations: uncompressed is a share between 0 and 1, not {self.uncompressed}"
            )
        if self.kind == "needles":
            self._check_needles()

    def _check_needles(self) -> None:
        if "{key}" not in self.needle or "{value}" not in self.needle:
            raise ValueError("conversations: needle must hold {key} and {value}")
        if len(set(self.keys)) < self.needles[1]:
            raise ValueError(f"conversations: {self.needles[1]} needles need at least so many different keys")
        longest = len(self.needle.format(key=max(self.keys, key=len), value="0" * self.digits))
        if longest * self.needles[0] >= self.context[0]:
            raise ValueError(
                f"conversations: {self.needles[0]} needles of up to {longest} characters do not fit in a "
                f"context of {self.context[0]}; raise context[0] or plant fewer"
            )


@dataclass
class SplitSettings:
    """Which documents are held out: those whose content's hash (with `salt`) falls into the first
    `heldout`."""

    heldout: float = 0.02
    salt: str = "lclm"

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1:
            raise ValueError(f"split.heldout is a share of at least 0 and below 1, not {self.heldout}")


@dataclass
class ShardSettings:
    """max_bytes: about how long a shard may become. shuffle_conversations: how many conversations a task
    keeps to write them in random order, so that those about one document do not lie together."""

    max_bytes: int = 256 * 1024 * 1024
    shuffle_conversations: int = 10_000

    def __post_init__(self) -> None:
        if self.max_bytes < 4096:
            raise ValueError(f"shards.max_bytes must be at least 4096, not {self.max_bytes}")


@dataclass
class ExecutorSettings:
    """Where the pipeline runs. kind: local | slurm | ray. tasks: into how many parts the work is cut, which
    decides the bytes of the result. workers: how many run at once, which does not. options: further
    arguments of datatrove's executor, such as {time: "08:00:00", partition: cpu} for slurm."""

    kind: str = "local"
    tasks: int = 4
    workers: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("executor", self.kind, EXECUTOR_KINDS)
        if self.tasks < 1 or self.workers < 1:
            raise ValueError("executor.tasks and executor.workers must be at least 1")


@dataclass
class PipelineSettings:
    """A pipeline recipe. `out` is the folder that the build makes; the rest says what goes into it."""

    schema: int = 1
    name: str = "data"
    out: str = "data/${name}"
    seed: int = 0
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    filters: dict[str, FilterSettings] = field(default_factory=dict)
    dedup: DedupSettings | None = None
    decontamination: DecontaminationSettings | None = None
    split: SplitSettings = field(default_factory=SplitSettings)
    documents: bool = True
    conversations: dict[str, ConversationSettings] = field(default_factory=dict)
    tokenizer: TokenizerSettings | None = None
    count_tokens_with: str | None = None
    shards: ShardSettings = field(default_factory=ShardSettings)
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)

    def __post_init__(self) -> None:
        if self.schema != 1:
            raise ValueError(f"schema is {self.schema}; this version reads pipeline recipes of schema 1")
        if not self.sources:
            raise ValueError("a pipeline recipe needs `sources:`")
        chats = [name for name, source in self.sources.items() if source.messages_key]
        if not self.documents and not self.conversations and not chats:
            raise ValueError("the recipe makes nothing: set `documents: true` or give `conversations:`")
        if self.tokenizer is not None and self.count_tokens_with is not None:
            raise ValueError("count_tokens_with has no effect beside `tokenizer:`, which counts; remove one")
        if self.tokenizer is not None and self.tokenizer.trained and not self.documents:
            raise ValueError(
                f"a tokenizer of kind {self.tokenizer.kind} learns from documents; set `documents: true`"
            )
