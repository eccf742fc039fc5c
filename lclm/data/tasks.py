"""Tasks: how a document or a conversation becomes examples that fit the room left in a pack."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lclm.data.boundaries import PIECE, Boundaries
from lclm.data.room import Room
from lclm.data.settings import TASK_OPTIONS, TaskSettings
from lclm.data.stream import Held
from lclm.model.spans import Example, Geometry, Size, Span
from lclm.model.text import SpanTokenizer

LEAST_TEXT = 8
"""Tokens of text that an interleaved example keeps after a memory, and below which no example is begun."""
SHARE_RANGE = 0.25
"""How far interleave may move from its memory_share to fill a pack evenly."""


@dataclass(frozen=True)
class Cut:
    """An example, what it costs, and its tokens before compression.

    offset: character where the document continues; None when it is used up.
    """

    example: Example
    size: Size
    offset: int | None
    source_tokens: int


class Document:
    """A held document with the places where it may be cut; `offset` in characters says how far it is used."""

    def __init__(self, held: Held, tokenizer: SpanTokenizer) -> None:
        assert held.sample.text is not None
        self.held, self.tokenizer, self.text = held, tokenizer, held.sample.text
        self.decoder = Boundaries(self.text, tokenizer.content.encode_with_offsets)
        self.same = tokenizer.encoder_content is tokenizer.content
        self.encoder = (
            self.decoder
            if self.same
            else Boundaries(self.text, tokenizer.encoder_content.encode_with_offsets)
        )

    @property
    def blank(self) -> bool:
        """Whether what is left has no tokens at all, so that no example can be made of it."""
        rest = range(self.held.offset, len(self.text), PIECE)
        return not any(len(self.tokenizer.content.encode(self.text[at : at + PIECE])) for at in rest)

    def memory(self, at: int, tokens: int, ratio: int) -> tuple[np.ndarray, int] | None:
        """At most `tokens` encoder tokens from `at`, whole blocks if it can be: (ids, end) or None."""
        chars, counts = self.encoder.after(at, tokens)
        if not self.same:
            allowed = np.isin(chars, self.decoder.after(at, 4 * tokens + 16)[0])
            chars, counts = chars[allowed], counts[allowed]
        last, shift, found = len(self.text), 0, None
        for _ in range(6):
            fitting = np.flatnonzero(counts + shift <= tokens)
            if not len(fitting):
                break
            whole = fitting[(counts[fitting] + shift) % ratio == 0]
            to_the_end = chars[fitting[-1]] == last
            choice = int(whole[-1] if len(whole) and not to_the_end else fitting[-1])
            end = int(chars[choice])
            ids = self.tokenizer.encoder_content.encode(self.text[at:end])
            if 0 < len(ids) <= tokens:
                found = found or (ids, end)
                if len(ids) % ratio == 0 or to_the_end:
                    return ids, end
            shift = len(ids) - int(counts[choice])
            chars, counts = chars[:choice], counts[:choice]
        return found

    def words(
        self, at: int, tokens: int, room: int, ending: int | None
    ) -> tuple[np.ndarray, int, bool] | None:
        """About `tokens` and at most `room` decoder tokens from `at`: (ids, end, ended) or None.

        Where the text ends, the id `ending` is added if given; if that does not fit, the text stops earlier.
        """
        tokens = min(tokens, room)
        if tokens < 1:
            return None
        chars, counts = self.decoder.after(at, tokens)
        for choice in range(len(chars) - 1, max(-1, len(chars) - 17), -1):
            if counts[choice] > tokens:
                continue
            end = int(chars[choice])
            ids = self.tokenizer.content.encode(self.text[at:end])
            ended = end == len(self.text)
            if len(ids) and ended and ending is not None:
                ids = np.append(ids, np.int32(ending))
            if 0 < len(ids) <= room:
                return ids, end, ended
        return None


class Task:
    """One entry of the mixture.

    kind: the data set it reads. flexible: it can cut its examples to whatever room is left. compresses: its
    examples may hold memory.
    """

    kind: ClassVar[str] = "documents"
    flexible: ClassVar[bool] = False
    compresses: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        settings: TaskSettings,
        tokenizer: SpanTokenizer,
        geometry: Geometry,
        ratios: Sequence[int] | None = None,
    ) -> None:
        self.name, self.settings, self.tokenizer, self.geometry = name, settings, tokenizer, geometry
        self.ratios = list(settings.ratios or ratios or [geometry.ratio])
        for ratio in self.ratios:
            try:
                geometry.span_ratio(Span("memory", np.zeros(1, np.int32), ratio=ratio))
            except ValueError as error:
                raise ValueError(f"data.tasks.{name}.ratios: {error}") from None
        ends = "end_of_text" in TASK_OPTIONS[settings.task] and settings.option("end_of_text")
        self.ending = tokenizer.end_of_text_id if ends else None

    def ratio(self, draws: random.Random) -> int:
        return self.ratios[int(draws.random() * len(self.ratios))]

    def span_length(self, draws: random.Random) -> float:
        """Log-uniform between min_span and max_span."""
        low, high = self.settings.option("min_span"), self.settings.option("max_span")
        return low * (high / low) ** draws.random()

    def rates(self) -> tuple[float, float]:
        """Row tokens per decoder position: the least and the most that its examples take."""
        return 0.0, 0.0

    def cut(self, document: Document, room: Room, draws: random.Random, limit: int) -> Cut | None:
        """An example from the document's offset on that fits `room`; None when nothing useful fits.

        limit: at most so many tokens of text, for tasks without memory.
        """
        raise AssertionError("documents are cut by the tasks that read them")

    def example(self, spans: list[Span], document: Document) -> Example:
        return Example(tuple(spans), f"{document.held.sample.key}@{document.held.offset}", self.name)


class Plain(Task):
    """Documents uncompressed: one text span with loss."""

    flexible, compresses = True, False

    def cut(self, document: Document, room: Room, draws: random.Random, limit: int) -> Cut | None:
        if room.open < LEAST_TEXT:
            return None
        words = document.words(document.held.offset, min(limit, room.open), room.open, self.ending)
        if words is None:
            return None
        ids, end, ended = words
        example = self.example([Span("text", ids, loss=True)], document)
        source_tokens = len(ids) - (ended and self.ending is not None)
        return Cut(example, Size(len(ids), (), 0), None if ended else end, source_tokens)


class Interleave(Task):
    """Text with loss and memory by turns, through the whole document (paper: continual pre-training)."""

    flexible = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.share = float(self.settings.option("memory_share"))
        self.low, self.high = max(0.0, self.share - SHARE_RANGE), min(0.95, self.share + SHARE_RANGE)
        self.least = int(self.settings.option("min_span"))
        self.most = int(self.settings.option("max_span"))

    def rates(self) -> tuple[float, float]:
        ratio = sum(self.ratios) / len(self.ratios)
        return tuple(s / (1 - s + s / ratio) for s in (self.low, self.high))  # type: ignore[return-value]

    def cut(self, document: Document, room: Room, draws: random.Random, limit: int) -> Cut | None:
        if room.open < LEAST_TEXT:
            return None
        trial, at, ended = room.copy(), document.held.offset, False
        spans: list[Span] = []
        rows_left, text_from = True, at
        memory_next = draws.random() < 0.5 or self._scarce(trial)
        while not ended and trial.open and rows_left:
            if memory_next:
                taken = self._memory(document, at, trial, draws)
                rows_left = taken is not None
                if taken is not None:
                    spans.append(taken[0])
                    at = taken[1]
                elif spans:
                    trial.take_text(-len(spans.pop().ids))
                    at = text_from
            words = self._text(document, at, trial, draws, rows_left)
            if words is None:
                break
            text_from = at
            ids, at, ended = words
            spans.append(Span("text", ids, loss=True))
            trial.take_text(len(ids))
            memory_next = True
        if not spans or spans[-1].kind == "memory":
            return None
        example = self.example(spans, document)
        source_tokens = sum(len(span.ids) for span in spans) - (ended and self.ending is not None)
        return Cut(example, self.geometry.size(example), None if ended else at, source_tokens)

    def _share(self, room: Room) -> float:
        """The share of memory that would use up positions and row tokens together, within what is allowed."""
        ratio = sum(self.ratios) / len(self.ratios)
        text = max(1.0, room.positions - room.row_tokens / ratio)
        return min(self.high, max(self.low, room.row_tokens / (room.row_tokens + text)))

    def _kept(self, room: Room) -> int:
        """Positions that memories in all free rows would take, with a little text after the last."""
        return room.row_tokens // min(self.ratios) + 2 * len(room.gaps) + LEAST_TEXT

    def _scarce(self, room: Room) -> bool:
        """Whether positions are so few that the free rows must be filled before more text is read."""
        return room.row_tokens >= self.least and room.positions - self._kept(room) < self.least

    def _memory(
        self, document: Document, at: int, room: Room, draws: random.Random
    ) -> tuple[Span, int] | None:
        """A memory span from `at` that leaves room, in the pack and in the document, for text after it."""
        share, ratio = self._share(room), self.ratio(draws)
        want = self.span_length(draws) * min(1.0, share / (1 - share))
        rest = document.encoder.rest(at, self.most + LEAST_TEXT)
        if rest < 2 * LEAST_TEXT:
            return None
        if want > rest - LEAST_TEXT:
            want = rest * share
        want = max(want, min(self.least, rest * share))
        if room.row_tokens < 1.5 * want or self._scarce(room):
            want = room.row_tokens
        most = min(self.most, rest - LEAST_TEXT, (room.open - 2 - LEAST_TEXT) * ratio)
        length = room.memory_length(int(want), min(self.least, int(rest * share)), most, ratio)
        taken = document.memory(at, length, ratio) if length else None
        if taken is None or not room.fits_memory(len(taken[0]), ratio):
            return None
        room.take_memory(len(taken[0]), ratio)
        return Span("memory", taken[0], ratio=ratio), taken[1]

    def _text(
        self, document: Document, at: int, room: Room, draws: random.Random, rows_left: bool
    ) -> tuple[np.ndarray, int, bool] | None:
        """A text span from `at`; the last one takes what is open, others leave enough for memory to come."""
        tokens = room.open
        if rows_left and room.row_tokens >= self.least:
            share = self._share(room)
            want = max(self.least, int(self.span_length(draws) * min(1.0, (1 - share) / share)))
            want = max(LEAST_TEXT, min(want, room.positions - self._kept(room)))
            if room.open - want > LEAST_TEXT + 2:
                tokens = want
        return document.words(at, tokens, room.open, self.ending)


class Reconstruct(Task):
    """A memory, a prompt without loss, and the memory's text (or an excerpt of it) again, with loss."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        prompt = self.settings.option("prompt")
        self.prompt = [self.tokenizer.text(prompt)] if prompt else []
        self.fixed = sum(len(span.ids) for span in self.prompt) + 2 + (self.ending is not None)
        self.least = int(self.settings.option("min_span"))
        self.most = int(self.settings.option("max_span"))
        self.excerpt = self.settings.excerpt

    def rates(self) -> tuple[float, float]:
        ratio = sum(self.ratios) / len(self.ratios)
        rates = [
            length / (length / ratio + (self.excerpt or length) + self.fixed)
            for length in (self.least, self.most)
        ]
        return min(rates), max(rates)

    def cut(self, document: Document, room: Room, draws: random.Random, limit: int) -> Cut | None:
        ratio, want = self.ratio(draws), self.span_length(draws)
        place = draws.random()
        at = document.held.offset
        rest = document.encoder.rest(at, self.most)
        least, most = min(self.least, rest), min(self.most, rest)
        repeated = 0.0 if self.excerpt else 1.0
        free = room.open - self.fixed - (self.excerpt or 0)
        for _ in range(4):
            most = min(most, int(free / (1 / ratio + repeated)))
            if most < least or most < 1:
                return None
            length = room.memory_length(int(want), least, most, ratio)
            taken = document.memory(at, length, ratio) if length else None
            if taken is None:
                return None
            cut = self._example(document, taken, ratio, place)
            if room.fits(cut.size):
                return cut
            most = min(most, length) - max(1, cut.size.positions - room.open)
        return None

    def _example(self, document: Document, taken: tuple[np.ndarray, int], ratio: int, place: float) -> Cut:
        ids, end = taken
        first, last = document.held.offset, end
        if self.excerpt:
            chars, _ = document.decoder.after(first, len(ids) * 4 + 16)
            chars = np.append(first, chars[chars <= end])
            begin = int(place * max(1, len(chars) - self.excerpt))
            first, last = int(chars[begin]), int(chars[min(begin + self.excerpt, len(chars) - 1)])
        if document.same and not self.excerpt:
            repetition = ids
        else:
            repetition = self.tokenizer.content.encode(document.text[first:last])
        if self.ending is not None:
            repetition = np.append(repetition, np.int32(self.ending))
        spans = [Span("memory", ids, ratio=ratio), *self.prompt, Span("text", repetition, loss=True)]
        example = self.example(spans, document)
        done = end == len(document.text)
        return Cut(example, self.geometry.size(example), None if done else end, len(ids))


class Chat(Task):
    """Conversations with memory parts, through the decoder's chat template. Never cut."""

    kind = "conversations"

    def conversation(self, held: Held, empty: Room, draws: random.Random) -> tuple[Cut | None, str | None]:
        """The example of a conversation that fits an empty pack, and what was done to make it fit.

        Returns (cut, None), (cut, "shortened") or (None, the reason why it is dropped).
        """
        assert held.sample.messages is not None
        try:
            spans = self.tokenizer.conversation(held.sample.messages, ratio=self.ratio(draws))
            example = Example(tuple(spans), held.sample.key, self.name)
            size = self.geometry.size(example)
        except ValueError as error:
            raise ValueError(f"conversation {held.sample.key!r} of task {self.name!r}: {error}") from error
        if not any(span.loss for span in spans[1:]) and not (spans[0].loss and len(spans[0].ids) > 1):
            return None, "no assistant text"
        done = None
        if not empty.fits(size):
            if self.settings.option("over_budget") == "skip":
                return None, "over budget"
            shorter = self._shortened(example, empty)
            if shorter is None:
                return None, "over budget without its memories"
            example, done = shorter, "shortened"
            size = self.geometry.size(example)
        return Cut(example, size, None, sum(len(span.ids) for span in example.spans)), done

    def _shortened(self, example: Example, empty: Room) -> Example | None:
        """Memories cut at their ends, the first ones first, until the example fits; None if it never does."""
        spans = list(example.spans)

        def fits(number: int, blocks: int) -> bool:
            tried = list(spans)
            tried[number] = replace(spans[number], ids=spans[number].ids[: blocks * ratio])
            return empty.fits(self.geometry.size(replace(example, spans=tuple(tried))))

        for number, span in enumerate(spans):
            if span.kind == "text":
                continue
            ratio = self.geometry.span_ratio(span)
            low, high = 1, math.ceil(len(span.ids) / ratio)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if fits(number, middle) else (low, middle - 1)
            fitted = fits(number, low)
            spans[number] = replace(span, ids=span.ids[: low * ratio])
            if fitted:
                return replace(example, spans=tuple(spans))
        return None


TASKS: dict[str, type[Task]] = {
    "interleave": Interleave,
    "plain": Plain,
    "reconstruct": Reconstruct,
    "chat": Chat,
}


def make_task(
    name: str,
    settings: TaskSettings,
    tokenizer: SpanTokenizer,
    geometry: Geometry,
    ratios: Sequence[int] | None = None,
) -> Task:
    """The task of a mixture entry. ratios: the model's, for a task that names none.

    ValueError for a ratio that the geometry cannot serve.
    """
    return TASKS[settings.task](name, settings, tokenizer, geometry, ratios)
