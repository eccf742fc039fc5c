"""One question about documents that are read as latents: what `lclm generate` does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lclm.ask.chat import Chat
from lclm.ask.documents import Document
from lclm.ask.reader import Reader, Sampling

_UNPRINTABLE = {number: "\ufffd" for number in (*range(32), *range(127, 160)) if chr(number) not in "\n\t"}


def say(text: str) -> None:
    """A line to standard error."""
    print(text, file=sys.stderr, flush=True)


def to_standard_output() -> Callable[[str], None]:
    """Writes pieces of answers; to a terminal without characters that would control it."""
    terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        sys.stdout.write(text.translate(_UNPRINTABLE) if terminal else text)
        sys.stdout.flush()

    return write


def answer(
    checkpoint: str,
    prompt: str,
    documents: Sequence[Document],
    *,
    sampling: Sampling,
    system: str | None = None,
    ratio: int | None = None,
    seed: int = 0,
    compare: bool = False,
) -> None:
    """Stream the answer to standard output, and what was read and how fast to standard error.

    `compare` answers a second time, without the documents. ValueError or OSError for an artifact that cannot
    be read, a checkpoint that is none, and a ratio or length that the model cannot take. KeyboardInterrupt
    when it is stopped, after the figures of what came until then.
    """
    reader = Reader(checkpoint)
    for given in (documents, []) if compare else (documents,):
        if given is not documents:
            say("\nwithout the documents:")
        chat = Chat(reader, sampling, say, system=system, ratio=ratio, seed=seed)
        compressing = chat.add(given)
        answered = chat.ask(prompt, to_standard_output())
        say(answered.figures.line(compressing))
        if answered.stopped:
            raise KeyboardInterrupt


def ask(checkpoint: str, conversations: Iterable[Sequence[dict[str, Any]]], max_new_tokens: int = 64) -> int:
    """Ask the first question of each conversation, at every ratio of the model; returns how many had memory.

    Prints each document, question, answer and true answer.
    """
    reader = Reader(checkpoint)
    asked = 0
    for messages in conversations:
        parts = _parts(messages[0]) if len(messages) > 1 else []
        memories = [part for part in parts if part["type"] == "memory"]
        if not memories:
            continue
        asked += 1
        question = "".join(part["text"] for part in parts if part["type"] == "text")
        lines = [f"  | {line}" for part in memories for line in part["text"].splitlines()]
        print("\n" + "\n".join(lines))
        print(f"question: {question}\n    true: {messages[1]['content']}")
        documents = [Document("document", part["text"]) for part in memories]
        for ratio in reader.model().config.ratios:
            chat = Chat(reader, Sampling(max_new_tokens), lambda _: None, ratio=ratio)
            chat.add(documents)
            answered = chat.ask(question, lambda _: None)
            read = answered.figures.read
            print(f"{ratio:>7}x: {answered.text}   (from {read.latents if read else 0} latents)", flush=True)
    return asked


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
