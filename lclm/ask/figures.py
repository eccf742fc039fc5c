"""What reading and answering took: tokens, latents, time to the first token, tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer


@dataclass(frozen=True)
class Read:
    """What documents have become. tokens: the encoder's. ratio: tokens per latent, None where it differs."""

    documents: int
    tokens: int
    latents: int
    ratio: int | None

    @classmethod
    def of(cls, memories: Iterable[Any]) -> Read:
        """Of an artifact's memories."""
        found = list(memories)
        ratios = {memory.ratio for memory in found}
        return cls(
            len(found),
            sum(memory.tokens for memory in found),
            sum(memory.latents for memory in found),
            ratios.pop() if len(ratios) == 1 else None,
        )

    def __str__(self) -> str:
        ratio = self.ratio or f"{self.tokens / max(self.latents, 1):.1f}"
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        return f"{self.tokens:,} tokens of {documents} as {self.latents:,} latents ({ratio}x)"


@dataclass(frozen=True)
class Figures:
    """Of one answer. Times in seconds, from the moment when the question was given.

    read: None without documents. text: decoder positions that are tokens, not latents. kept: positions that
    were in the cache already. tokens: of the answer, its end included. first, last: when these came, None if
    none did. cut: ended by the limit on new tokens.
    """

    read: Read | None
    text: int
    kept: int
    tokens: int
    first: float | None
    last: float | None
    cut: bool

    def line(self, compressing: float = 0.0) -> str:
        """As shown after an answer. compressing: seconds spent on the documents before, to be counted too."""
        seen = f"{self.read} and {self.text:,} as they are" if self.read else f"{self.text:,} as they are"
        kept = f", {self.kept:,} positions kept" if self.kept else ""
        if self.first is None or self.last is None:
            return f"read {seen}{kept}; no token came"
        first = f"first token after {self.first + compressing:.2f} s"
        if compressing:
            first += f" ({compressing:.2f} s of it compressing)"
        rate = f" at {(self.tokens - 1) / (self.last - self.first):,.1f} tokens/s" if self.tokens > 1 else ""
        cut = ", cut by --max-new-tokens" if self.cut else ""
        return f"read {seen}{kept}; {first}, {self.tokens:,} token{'s' * (self.tokens != 1)}{rate}{cut}"


class Stream(TextStreamer):
    """Gives an answer's text to `write` as it comes, keeps it, and notes when its tokens came, from `begun`
    (time.perf_counter) on."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], begun: float) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self.ids: list[int] = []
        self.first: float | None = None
        self.last: float | None = None
        self._write = write
        self._begun = begun

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
            self.last = time.perf_counter() - self._begun
            self.first = self.last if self.first is None else self.first
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._write(f"{text}\n" if stream_end else text)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, of how many) that moves a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
