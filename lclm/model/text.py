"""From text to spans: content can never become control, marks and templates can. No torch.

Content (documents, message parts) is tokenised by a second backend made from the same tokenizer with its
added tokens taken out. Template text and explicit prompts are tokenised with control tokens on.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .chat import Piece, render
from .spans import Span

MEMORY_START = "<|memory_start|>"
MEMORY_END = "<|memory_end|>"
MEMORY = "<|memory|>"
MARKS = (MEMORY_START, MEMORY_END, MEMORY)

_MARK = re.compile("|".join(re.escape(mark) for mark in MARKS))
_MOST_KNOWN = 2048
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def _backend(tokenizer: Any) -> Tokenizer:
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast backend; lclm needs a tokenizer with a tokenizer.json "
            "(load it with AutoTokenizer and save it once to get one)"
        )
    return backend


def _without_controls(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer with its added tokens gone, from the model's own vocabulary too.

    An added token that the model vocabulary also holds could still arise there (whole-word BPE, Unigram), so
    its entry is renamed to a random private string. The unknown token stays: it is how unknown text reads.
    """
    state = json.loads(backend.to_str())
    model = state["model"]
    added = {token["content"] for token in state["added_tokens"]}
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    hidden = {text: f"\ue000{secrets.token_hex(16)}\ue001" for text in added if text != unknown}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden.get(text, text): number for text, number in vocabulary.items()}
    else:
        model["vocab"] = [[hidden.get(text, text), score] for text, score in vocabulary]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in hidden]
    state.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
    return Tokenizer.from_str(json.dumps(state))


def _merged(merge: str | Sequence[str]) -> str:
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


class ContentTokenizer:
    """Tokenises documents and message text; no added token, special or not, can ever arise from it."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = _without_controls(_backend(tokenizer))

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [T] (T may be 0)."""
        return np.array(self._encode(text).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for many texts at once."""
        for text in texts:
            _check_text(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] and the character at which each token starts, int64 [T].

        A start is -1 where the token begins inside a character, so that no cut can be made before it.
        """
        ids, offsets = self._offsets(text)
        starts = offsets[:, 0].copy()
        inside = offsets[1:, 0] < np.maximum.accumulate(offsets[:, 1])[:-1]
        starts[1:][inside] = -1
        return ids, starts

    def encode_with_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] and the character of `text` that each token starts at or in, int64 [T], never
        falling."""
        ids, offsets = self._offsets(text)
        return ids, np.minimum(np.maximum.accumulate(offsets[:, 0]), max(len(text) - 1, 0))

    def _offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._encode(text)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int32), offsets

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of content ids; ids that content cannot hold (added tokens) read as nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def _encode(self, text: str) -> Any:
        _check_text(text)
        return self._backend.encode(text, add_special_tokens=False)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate at character {error.start}, which is not Unicode text; "
            "decode the source with errors='replace' or drop it"
        ) from None


class SpanTokenizer:
    """Makes spans of text, memories, conversations and explicit prompts, for the processor, tasks and probes.

    tokenizer: the decoder's fast tokenizer, holding the three marks. encoder_tokenizer: the encoder's, or
    None if it is the same.
    """

    def __init__(self, tokenizer: Any, encoder_tokenizer: Any | None = None) -> None:
        self.tokenizer = tokenizer
        self.mark_ids = mark_ids(tokenizer)
        self.content = ContentTokenizer(tokenizer)
        self.encoder_content = self.content
        if encoder_tokenizer is not None and not _alike(tokenizer, encoder_tokenizer):
            self.encoder_content = ContentTokenizer(encoder_tokenizer)
        self._backend = Tokenizer.from_str(_backend(tokenizer).to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._controls = frozenset(self._backend.get_added_tokens_decoder())
        self._shapes: dict[Any, list[str]] = {}
        self._template_spans: dict[Piece, list[Span]] = {}

    @property
    def end_of_text_id(self) -> int:
        """Decoder token that ends a document: `<|endoftext|>` or its like, else the end-of-sequence token."""
        for text in _END_OF_TEXT:
            number = self._backend.token_to_id(text)
            if number is not None and number in self._controls:
                return number
        if getattr(self.tokenizer, "eos_token_id", None) is None:
            raise ValueError("the decoder's tokenizer has no end-of-text token; set its eos_token")
        return int(self.tokenizer.eos_token_id)

    @property
    def end_ids(self) -> list[int]:
        """Decoder tokens that end an answer: end of text, end of sequence, and the chat template's end of
        turn."""
        ends = {self.end_of_text_id}
        if getattr(self.tokenizer, "eos_token_id", None) is not None:
            ends.add(int(self.tokenizer.eos_token_id))
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            last = int([span for span in self.conversation(turns) if span.loss][-1].ids[-1])
            ends |= {last} & self._controls
        return sorted(ends)

    def text(self, text: str, loss: bool = False) -> Span:
        """A text span of content. ValueError when `text` has no tokens."""
        ids = self.content.encode(text)
        if not len(ids):
            raise ValueError(f"text {text[:40]!r} has no tokens")
        return Span("text", ids, loss)

    def memory(self, text: str, ratio: int | None = None) -> Span:
        """A memory span of content, in the encoder's tokens. ValueError when `text` has no tokens."""
        ids = self.encoder_content.encode(text)
        if not len(ids):
            raise ValueError(
                f"memory {text[:40]!r} is empty: there is nothing to compress; leave the part out"
            )
        return Span("memory", ids, ratio=ratio)

    def controls(self, text: str) -> np.ndarray:
        """Ids of trusted text (a template, a prompt) with control tokens on, int32 [T]; marks are an
        error."""
        _check_text(text)
        ids = np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        if np.isin(ids, self.mark_ids).any():
            raise ValueError(
                f"text {text[:60]!r} turns into a memory mark in the tokenizer; write the marks as they are"
            )
        return ids

    def prompt(self, text: str, ratio: int | None = None) -> list[Span]:
        """Spans of a prompt that carries its marks: `...<|memory_start|>document<|memory_end|>...`.

        Text outside the marks is tokenised with control tokens on, what is inside is content. Unbalanced,
        nested or empty marks and hand-written slots are a ValueError with the place.
        """
        spans: list[Span] = []
        position, opened = 0, -1
        for match in _MARK.finditer(text):
            mark, at = match.group(), match.start()
            if mark == MEMORY:
                raise ValueError(
                    f"{MEMORY} at character {at}: slots are made by the processor; write {MEMORY_START}"
                    f"document{MEMORY_END}"
                )
            if mark == MEMORY_START:
                if opened >= 0:
                    raise ValueError(
                        f"{MEMORY_START} at character {at} inside the memory opened at character "
                        f"{opened}: memories cannot nest; close the first with {MEMORY_END}"
                    )
                spans += self._trusted(text[position:at])
                opened = at
            elif opened < 0:
                raise ValueError(
                    f"{MEMORY_END} at character {at} closes nothing; put {MEMORY_START} before the memory"
                )
            else:
                if position == at:
                    raise ValueError(
                        f"the memory opened at character {opened} is empty: put text between "
                        f"{MEMORY_START} and {MEMORY_END}, or leave both out"
                    )
                spans.append(self.memory(text[position:at], ratio))
                opened = -1
            position = match.end()
        if opened >= 0:
            raise ValueError(f"{MEMORY_START} at character {opened} is never closed; add {MEMORY_END}")
        spans += self._trusted(text[position:])
        if not spans:
            raise ValueError("the prompt is empty")
        return spans

    def conversation(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        ratio: int | None = None,
        **template_options: Any,
    ) -> list[Span]:
        """Spans of chat messages, through the tokenizer's chat template.

        Messages: {"role", "content"}, content a str or parts {"type": "text", "text"} and
        {"type": "memory", "text", "ratio"?} or {"type": "memory", "artifact"}, which gives one memory for
        each of the artifact. Assistant content and its end-of-turn token bear loss. `ratio` is for memory
        parts that name none. template_options go to the template.
        """
        spans: list[Span] = []
        if len(self._shapes) > _MOST_KNOWN or len(self._template_spans) > _MOST_KNOWN:
            self._shapes, self._template_spans = {}, {}
        pieces = render(self.tokenizer, messages, add_generation_prompt, template_options, self._shapes)
        for piece in pieces:
            spans += self._piece(piece, ratio)
        return _join(spans)

    def _piece(self, piece: Piece, ratio: int | None) -> list[Span]:
        if piece.sizes:
            return [Span.ready(size) for size in piece.sizes]
        if piece.kind == "memory":
            return [self.memory(piece.text, piece.ratio or ratio)]
        if piece.kind == "text":
            ids = self.content.encode(piece.text)
            return [Span("text", ids, piece.loss)] if len(ids) else []
        if piece not in self._template_spans:
            self._template_spans[piece] = self._template(piece)
        return self._template_spans[piece]

    def _template(self, piece: Piece) -> list[Span]:
        ids = self.controls(piece.text)
        if not len(ids):
            return []
        if not piece.loss:
            return [Span("text", ids)]
        control = np.isin(ids, list(self._controls)).nonzero()[0]
        end = int(control[0]) + 1 if len(control) else 1
        spans = [Span("text", ids[:end], loss=True)]
        return spans + ([Span("text", ids[end:])] if end < len(ids) else [])

    def _trusted(self, text: str) -> list[Span]:
        ids = self.controls(text)
        return [Span("text", ids)] if len(ids) else []


def _join(spans: list[Span]) -> list[Span]:
    """Neighbouring text spans of equal loss become one."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last is not None and last.kind == span.kind == "text" and last.loss == span.loss:
            joined[-1] = Span("text", np.concatenate([last.ids, span.ids]), span.loss)
        else:
            joined.append(span)
    return joined


def _alike(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers are one, or written down the same."""
    return tokenizer is other or _backend(tokenizer).to_str() == _backend(other).to_str()


def mark_ids(tokenizer: Any) -> tuple[int, int, int]:
    """Ids of (memory start, memory end, memory); ValueError unless the tokenizer holds all three as added
    tokens."""
    added = {
        token.content: number for number, token in _backend(tokenizer).get_added_tokens_decoder().items()
    }
    missing = [mark for mark in MARKS if mark not in added]
    if missing:
        raise ValueError(
            f"the decoder's tokenizer lacks the marks {', '.join(missing)}; add them with "
            "lclm.model.text.add_marks(tokenizer) and resize the decoder's embeddings, as build_model does"
        )
    return added[MEMORY_START], added[MEMORY_END], added[MEMORY]


def add_marks(tokenizer: Any) -> int:
    """Add the marks that a transformers tokenizer lacks, as special tokens; returns how many were added."""
    added = {token.content for token in _backend(tokenizer).get_added_tokens_decoder().values()}
    return int(tokenizer.add_tokens([mark for mark in MARKS if mark not in added], special_tokens=True))
