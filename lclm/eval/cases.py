"""The probes' material: passages of held-out documents, needle conversations, and their examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lclm.model.spans import Example, Span

ROUNDS = 32  # most passages taken from one document, when there are fewer documents than samples


@dataclass(frozen=True)
class Passage:
    """A stretch of one document: `context` (as text and as decoder ids) and the ids that follow it."""

    document: int
    context: str
    context_ids: np.ndarray
    next_ids: np.ndarray


def sample_passages(
    documents: Sequence[str], content: Any, context: int, following: int, count: int, rng: np.random.Generator
) -> list[Passage]:
    """Up to `count` passages of exactly `context` + `following` tokens of `content` (a ContentTokenizer).

    One of each document in random order, then, if there are too few documents, up to ROUNDS of each. Cuts are
    token boundaries that are character boundaries, so that the context is the same text for both tokenizers.
    """
    passages: list[Passage] = []
    length = context + following
    order = rng.permutation(len(documents))
    for _ in range(ROUNDS):
        for document in order:
            if len(passages) == count:
                return passages
            text = documents[document]
            reach = 16 * length + 256  # characters: enough of a long text to hold the passage
            begin = int(rng.integers(0, max(1, len(text) - reach + 1)))
            text = text[begin : begin + reach]
            ids, starts = content.encode_with_offsets(text)
            if len(ids) <= length:
                continue
            starts = np.append(starts, len(text))
            first = np.arange(len(ids) - length + 1)
            ends = starts[[first, first + context, first + length]]
            first = first[(ends >= 0).all(axis=0) & (ends[0] < ends[1])]
            if not len(first):
                continue
            a = int(rng.choice(first))
            b = a + context
            passages.append(
                Passage(int(document), text[starts[a] : starts[b]], ids[a:b], ids[b : a + length])
            )
    return passages


def others(passages: Sequence[Passage]) -> list[int] | None:
    """For each passage the index of one of another document, each used about as often; None if impossible."""
    n = len(passages)
    partners = []
    for i in range(n):
        shifts = ((i + n // 2 + k) % n for k in range(n))
        partner = next((j for j in shifts if passages[j].document != passages[i].document), None)
        if partner is None:
            return None
        partners.append(partner)
    return partners


def continuation(memory: Span | None, context_ids: np.ndarray | None, passage: Passage) -> Example:
    """The passage's next tokens after a memory, after uncompressed ids, or after nothing."""
    before = [memory] if memory is not None else []
    if context_ids is not None:
        before.append(Span("text", context_ids))
    return Example((*before, Span("text", passage.next_ids, loss=True)))


def reconstruction(memory: Span, prompt: list[Span], passage: Passage) -> Example:
    """memory, prompt, the memory's own text: as the `reconstruct` task trains it."""
    return Example((memory, *prompt, Span("text", passage.context_ids, loss=True)))


@dataclass(frozen=True)
class Needle:
    """A conversation whose first answer is a number that stands in its memory."""

    messages: list[dict]  # up to and without the answer
    answer: str
    numbers: int  # numbers of as many digits in the memory: 1 = nothing to confuse it with

    def memory(self) -> str:
        """The text of its memories."""
        return "\n".join(part["text"] for part in _parts(self.messages) if part["type"] == "memory")

    def question(self) -> str:
        """The text around the memories."""
        return "\n".join(part["text"] for part in _parts(self.messages) if part["type"] == "text").strip()

    def with_memory(self, kind: str) -> list[dict]:
        """The messages with memories kept ("compressed"), left out ("none") or as text ("uncompressed")."""
        messages = []
        for message in self.messages:
            parts = message["content"]
            if not isinstance(parts, str):
                kept = [part for part in parts if kind != "none" or part["type"] != "memory"]
                parts = [_part(part, kind) for part in kept]
            messages.append({**message, "content": parts})
        return messages


def _parts(messages: Sequence[dict]) -> list[dict]:
    """All parts of all messages; content that is one text counts as a text part."""
    contents = [message["content"] for message in messages]
    return [part for c in contents for part in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]


def _part(part: dict, kind: str) -> dict:
    """The part without a ratio of its own: the probe sets it."""
    return {"type": "text" if kind == "uncompressed" else part["type"], "text": part["text"]}


def find_needles(conversations: Sequence[list[dict]]) -> list[Needle]:
    """The conversations that ask for a number found in their memories; later turns of them are left out."""
    found = []
    for messages in conversations:
        end = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
        if not end:
            continue
        answer = "".join(part["text"] for part in _parts(messages[end : end + 1]))
        if not re.fullmatch(r"[0-9]+", answer):
            continue
        needle = Needle(messages[:end], answer, 0)
        numbers = re.findall(rf"(?<![0-9])[0-9]{{{len(answer)}}}(?![0-9])", needle.memory())
        if answer in numbers:
            found.append(replace(needle, numbers=len(set(numbers))))
    return found
