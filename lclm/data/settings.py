"""The recipe's `data:` section. No torch and no numpy here, so that reading a recipe stays light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

TASK_OPTIONS: dict[str, dict[str, Any]] = {
    "interleave": {
        "ratios": None,
        "min_span": 64,
        "max_span": 4096,
        "memory_share": 0.5,
        "end_of_text": True,
    },
    "plain": {"end_of_text": True},
    "reconstruct": {
        "ratios": None,
        "min_span": 64,
        "max_span": 4096,
        "prompt": "Repeat the text above word for word:\n",
        "excerpt": None,
        "end_of_text": True,
    },
    "chat": {"ratios": None, "over_budget": "skip"},
}
"""The options that each task uses, with their defaults."""
LEAST_ATTENTION = 64
"""Below it, texts would be cut into shreds."""


@dataclass
class SourceSettings:
    """A data set split: a folder or fsspec URL with a manifest and shards (`lclm data build` makes one)."""

    path: str = ""


@dataclass
class PackSettings:
    """The fixed shape of one pack. `lclm data budget RECIPE` proposes rows and latents for given positions.

    positions: D, decoder positions. rows: E, encoder rows. latents: M, rows of the table of latents.
    attention: the most that the squared lengths of a pack's examples may sum to, per decoder position; longer
    texts are cut (never a conversation). It evens out the decoder's work between processes; null: no bound.
    """

    positions: int = 4096
    rows: int = 4
    latents: int = 1024
    attention: int | None = None

    def validate(self, where: str = "data.pack") -> None:
        """ValueError unless all are at least 1, and attention's bound is one."""
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and value < 1:
                raise ValueError(f"{where}.{item.name} is {value}; it must be at least 1")
        if self.attention is not None and not LEAST_ATTENTION <= self.attention < self.positions:
            raise ValueError(
                f"{where}.attention is {self.attention}; it must be at least {LEAST_ATTENTION} and below "
                f"positions ({self.positions}), where it would bound nothing; null sets no bound"
            )


@dataclass
class ReadingSettings:
    """What to do about reads that fail and samples that are damaged. None of it changes the order of data.

    A read that fails is tried again `retries` times, after `wait_seconds`, then twice that, and so on, give
    or take a half. timeout_seconds: limit of one try at a remote read. A sample that is still damaged,
    missing or unreadable is left out and counted. The run stops when more than max_skipped samples and more
    than max_skipped_share of all samples read so far had to be.
    """

    retries: int = 6
    wait_seconds: float = 0.5
    timeout_seconds: float = 30.0
    max_skipped: int = 32
    max_skipped_share: float = 0.001

    def validate(self, where: str = "data.reading") -> None:
        """ValueError for a value out of range."""
        for name in ("retries", "wait_seconds", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{where}.{name} is {getattr(self, name)}; it must be at least 0")
        if self.timeout_seconds <= 0:
            raise ValueError(f"{where}.timeout_seconds is {self.timeout_seconds}; it must be above 0")
        if not 0 <= self.max_skipped_share < 1:
            raise ValueError(
                f"{where}.max_skipped_share is {self.max_skipped_share}; it must be at least 0 and below 1"
            )

    def allows(self, damaged: int, read: int) -> bool:
        """Whether a run may go on that had to leave out `damaged` of `read` samples."""
        return damaged <= max(self.max_skipped, self.max_skipped_share * read)


@dataclass
class TaskSettings:
    """One way of making examples. An option that the task does not use must be left out.

    task: interleave | plain | reconstruct | chat. source: a name in `data.sources`.
    ratios: tokens per latent, one of them drawn for each memory (interleave) or example (others); null: the
    model's. min_span, max_span: bounds of a span in encoder tokens (log-uniform; reconstruct: of its memory).
    memory_share: interleave's share of tokens that are compressed.
    prompt: reconstruct's text between the memory and its repetition, without loss.
    excerpt: reconstruct repeats only so many tokens, from a random place of the memory; null repeats all.
    end_of_text: end the last text of a document (reconstruct: every repetition) with the end-of-text token.
    over_budget: what becomes of a conversation that no pack can hold: skip | shorten (its memories).
    """

    task: Literal["interleave", "plain", "reconstruct", "chat"] = "plain"
    source: str = ""
    ratios: list[int] | None = None
    min_span: int | None = None
    max_span: int | None = None
    memory_share: float | None = None
    prompt: str | None = None
    excerpt: int | None = None
    end_of_text: bool | None = None
    over_budget: Literal["skip", "shorten"] | None = None

    def option(self, name: str) -> Any:
        """The option's value, or the task's default where it was left out."""
        value = getattr(self, name)
        return TASK_OPTIONS[self.task][name] if value is None else value

    def validate(self, where: str) -> None:
        """ValueError for an unknown task, an option that the task does not use, or a value out of range."""
        if self.task not in TASK_OPTIONS:
            raise ValueError(f"{where}.task is {self.task!r}; known tasks: {', '.join(TASK_OPTIONS)}")
        used = TASK_OPTIONS[self.task]
        for item in fields(self):
            name = item.name
            if name not in ("task", "source", *used) and getattr(self, name) is not None:
                raise ValueError(
                    f"{where}.{name} has no effect on task {self.task!r}; remove it. "
                    f"Options of {self.task}: {', '.join(used)}"
                )
        if not self.source:
            raise ValueError(f"{where}.source is missing; name one of data.sources")
        if self.ratios is not None and (not self.ratios or min(self.ratios) < 1):
            raise ValueError(f"{where}.ratios is {self.ratios}; give whole numbers of 1 or more, or null")
        if "min_span" in used:
            low, high = self.option("min_span"), self.option("max_span")
            if not 1 <= low <= high:
                raise ValueError(
                    f"{where}: min_span {low} and max_span {high} must hold 1 <= min_span <= max_span"
                )
            if self.excerpt is not None and not 1 <= self.excerpt <= low:
                raise ValueError(
                    f"{where}.excerpt is {self.excerpt}; it must be at least 1 and at most min_span ({low})"
                )
        if self.memory_share is not None and not 0.0 < self.memory_share < 1.0:
            raise ValueError(f"{where}.memory_share is {self.memory_share}; it must be between 0 and 1")
        if self.over_budget not in (None, "skip", "shorten"):
            raise ValueError(f"{where}.over_budget is {self.over_budget!r}; it must be skip or shorten")


@dataclass
class DataSettings:
    """Which data a run reads, what is made of them, and the shape of a step.

    lanes: L, packs in one step over all processes. micro_batch: B, packs in one forward; accumulation is
    lanes / (processes x micro_batch). workers: background processes per process (0: none); any number gives
    the same batches. prefetch: packs that each worker keeps ready. run_samples: neighbouring samples of a
    shard that are read together. lookahead: conversations that a lane holds to choose from (documents: a
    quarter of it). epochs: stop after so many passes over each source; null goes on for ever. reading: what
    to do about reads that fail. pack: the shape of one pack. sources, heldout: data to learn from, and data
    kept for validation and probes. mixture: shares of the source tokens by task name, of any sum; a stage may
    have its own.
    """

    lanes: int = 8
    micro_batch: int = 1
    workers: int = 1
    prefetch: int = 8
    run_samples: int = 32
    lookahead: int = 32
    epochs: int | None = None
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    pack: PackSettings = field(default_factory=PackSettings)
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    heldout: dict[str, SourceSettings] = field(default_factory=dict)
    tasks: dict[str, TaskSettings] = field(default_factory=dict)
    mixture: dict[str, float] = field(default_factory=dict)

    def validate(self, where: str = "data") -> None:
        """ValueError, naming the key, for settings that cannot work."""
        for name, least in (
            ("lanes", 1),
            ("micro_batch", 1),
            ("workers", 0),
            ("prefetch", 1),
            ("run_samples", 1),
            ("lookahead", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{where}.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"{where}.epochs is {self.epochs}; it must be at least 1, or null for no end")
        if self.lanes % self.micro_batch:
            raise ValueError(
                f"{where}.lanes ({self.lanes}) must be a multiple of {where}.micro_batch ({self.micro_batch})"
            )
        self.pack.validate(f"{where}.pack")
        self.reading.validate(f"{where}.reading")
        for group in ("sources", "heldout"):
            for name, source in getattr(self, group).items():
                if not source.path:
                    raise ValueError(
                        f"{where}.{group}.{name}.path is missing; give the folder of a built data set"
                    )
        for name, task in self.tasks.items():
            task.validate(f"{where}.tasks.{name}")
            if task.source not in self.sources:
                raise ValueError(
                    f"{where}.tasks.{name}.source is {task.source!r}, which is not in {where}.sources: "
                    f"{', '.join(self.sources) or 'none are set'}"
                )
        self.validate_mixture(self.mixture, f"{where}.mixture")

    def validate_mixture(self, mixture: Mapping[str, float], where: str) -> None:
        """ValueError unless every name is a task and the shares are not negative and not all zero."""
        for name, share in mixture.items():
            if name not in self.tasks:
                raise ValueError(
                    f"{where} names {name!r}, which is not in data.tasks: {', '.join(self.tasks)}"
                )
            if share < 0:
                raise ValueError(f"{where}.{name} is {share}; a share cannot be negative")
        if not any(share > 0 for share in mixture.values()):
            raise ValueError(f"{where} must give at least one task of data.tasks a share above 0")

    def validate_world(self, world: int) -> None:
        """ValueError unless `world` processes can share the lanes equally in whole micro-batches."""
        if self.lanes % (world * self.micro_batch):
            raise ValueError(
                f"data.lanes ({self.lanes}) must be a multiple of processes x data.micro_batch "
                f"({world} x {self.micro_batch}); change one of the three"
            )

    def accumulation(self, world: int) -> int:
        """Micro-batches that each of `world` processes takes in one step."""
        self.validate_world(world)
        return self.lanes // (world * self.micro_batch)

    def for_heldout(self) -> DataSettings:
        """The same settings reading the held-out data, with the tasks that have a held-out source."""
        tasks = {name: task for name, task in self.tasks.items() if task.source in self.heldout}
        mixture = {name: share for name, share in self.mixture.items() if name in tasks}
        return replace(self, sources=dict(self.heldout), tasks=tasks, mixture=mixture, epochs=None)
