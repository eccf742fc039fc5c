"""A conversation about documents: they are compressed once, and what was read is kept between turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lclm.ask.documents import ARTIFACT, Document
from lclm.ask.figures import Read
from lclm.ask.reader import Answer, Past, Reader, Sampling
from lclm.model.artifact import Artifact


@dataclass
class Turn:
    """artifacts: the documents that the conversation was given with this question, before its text."""

    artifacts: list[Artifact]
    question: str
    answer: str | None = None


class Chat:
    """Turns, documents and the decoder's cache. `tell` gets what the user should know, a line at a time.

    Documents stand before the first question, those added later before the next one. Turns that no longer fit
    into the decoder's positions are forgotten, the oldest first; documents never are.
    """

    def __init__(
        self,
        reader: Reader,
        sampling: Sampling,
        tell: Callable[[str], None],
        *,
        system: str | None = None,
        ratio: int | None = None,
        seed: int = 0,
    ) -> None:
        self._reader = reader
        self._sampling = sampling
        self._tell = tell
        self._system = system
        self._ratio = ratio
        self._seed = seed
        self._turns: list[Turn] = []
        self._waiting: list[Artifact] = []
        self._past = Past()
        torch.manual_seed(seed)

    @property
    def artifacts(self) -> list[Artifact]:
        """All documents, in the order in which they were given."""
        return [a for turn in self._turns for a in turn.artifacts] + self._waiting

    def add(self, documents: Sequence[Document]) -> float:
        """Read documents, for the next question; returns the seconds that it took to compress them.

        ValueError as Reader.read; none of `documents` is added then.
        """
        if not documents:
            return 0.0
        texts = any(document.text is not None for document in documents)
        self._reader.model(encoder=texts)  # loading is not counted
        begun = time.perf_counter()
        added = self._reader.read(documents, self._ratio if texts else None, self._room())
        seconds = time.perf_counter() - begun if texts else 0.0
        read = Read.of(memory for artifact in added for memory in artifact.memories)
        self._tell(f"read {read}" + (f" in {seconds:.2f} s" if texts else ", compressed before"))
        self._waiting += added
        return seconds

    def ask(self, question: str, write: Callable[[str], None]) -> Answer:
        """Stream the answer to `write`. ValueError if documents, question and answer do not fit.

        A question that is refused, or stopped before a word came, leaves the conversation as it was.
        """
        self._reader.model()
        begun = time.perf_counter()
        turn = Turn(self._waiting, question)
        self._waiting = []
        self._turns.append(turn)
        try:
            inputs = self._fitting()
            answer = self._reader.answer(inputs, self.artifacts, self._sampling, write, self._past, begun)
            turn.answer = answer.text
        finally:
            if not turn.answer:
                self._turns.pop()
                self._waiting = turn.artifacts
        return answer

    def reset(self) -> None:
        """Forget all turns; the documents stay."""
        self._waiting, self._turns = self.artifacts, []
        torch.manual_seed(self._seed)

    def save(self, path: Path) -> None:
        """Write all documents as one artifact. ValueError if there are none, or for a path that is no new
        .lclm."""
        if path.suffix != ARTIFACT:
            raise ValueError(f"{path}: an artifact's name ends in {ARTIFACT}")
        if path.exists():
            raise ValueError(f"{path}: exists already; choose another name")
        if not self.artifacts:
            raise ValueError("there are no documents to save; /add FILE adds one")
        Artifact.concatenate(self.artifacts).save(path)

    def _room(self) -> int | None:
        """Latents of further documents that the decoder has positions for."""
        if (limit := self._reader.positions) is None:
            return None
        return limit - self._sampling.max_new_tokens - sum(sum(artifact.sizes) for artifact in self.artifacts)

    def _fitting(self) -> Any:
        """Arrays of the conversation from the first turn on that it fits from; turns before are forgotten."""
        new, limit = self._sampling.max_new_tokens, self._reader.positions
        for first in range(len(self._turns)):
            inputs = self._reader.inputs(self._messages(first))
            positions = inputs["input_ids"].shape[1]
            if limit is None or positions + new <= limit:
                break
        else:
            raise ValueError(
                f"documents and question take {positions:,} positions: with {new:,} new tokens, more than "
                f"the {limit:,} of the decoder; ask a shorter question, lower --max-new-tokens, raise "
                "--ratio, or give fewer documents"
            )
        if first:
            self._tell(
                f"forgotten: the oldest {first} of {len(self._turns) - 1} turns, "
                f"for the decoder has {limit:,} positions"
            )
            self._turns[first].artifacts = self._documents(first)
            del self._turns[:first]
        return inputs

    def _documents(self, first: int) -> list[Artifact]:
        return [artifact for turn in self._turns[: first + 1] for artifact in turn.artifacts]

    def _messages(self, first: int) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self._system is not None:
            messages.append({"role": "system", "content": self._system})
        for number, turn in enumerate(self._turns[first:]):
            artifacts = turn.artifacts if number else self._documents(first)
            memories = [{"type": "memory", "artifact": artifact} for artifact in artifacts]
            text = {"type": "text", "text": turn.question}
            messages.append({"role": "user", "content": [*memories, text]})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages
