"""Tokenizers for models trained from scratch, saved as folders that transformers loads.

Three kinds: `bpe` (byte-level BPE), `sentencepiece` (a unigram model, bytes for unknown characters) and
`bytes` (256 bytes plus chosen words and phrases, nothing to train). All carry the control tokens, the marks
and a chat template.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
CONTROLS = (
    END_OF_TEXT,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    END_OF_TURN,
    "<|memory_start|>",
    "<|memory_end|>",
    "<|memory|>",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("bpe", "sentencepiece", "bytes")


@dataclass
class TokenizerSettings:
    """The pipeline recipe's `tokenizer:` section.

    kind: bpe | sentencepiece | bytes. vocabulary: tokens to learn, controls not counted (bpe,
    sentencepiece). words: whole words or phrases, each one token (bytes); one that holds {key} stands for
    one word for each key. keys: what {key} stands for. max_bytes: how much of the training documents to
    learn from. chat_template: a Jinja template over the control tokens.
    """

    kind: str = "bytes"
    vocabulary: int | None = None
    words: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    max_bytes: int = 100_000_000
    chat_template: str = CHAT_TEMPLATE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"tokenizer.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.kind == "bytes" and self.vocabulary is not None:
            raise ValueError(
                "tokenizer.vocabulary has no effect on kind bytes (256 bytes and `words`); remove it"
            )
        if self.kind != "bytes":
            if self.words or self.keys:
                raise ValueError(f"tokenizer.words and keys have no effect on kind {self.kind}; remove them")
            if self.vocabulary is None or self.vocabulary < 300:
                raise ValueError(f"tokenizer.vocabulary of kind {self.kind} must be a number of at least 300")
        if self.keys and not any("{key}" in word for word in self.words):
            raise ValueError("tokenizer.keys has no effect unless one of tokenizer.words holds {key}")

    @property
    def whole_words(self) -> list[str]:
        """All words and phrases, `{key}` filled in, without repeats, in order."""
        found: dict[str, None] = {}
        for word in self.words:
            for text in [word.replace("{key}", key) for key in self.keys] if "{key}" in word else [word]:
                found[text] = None
        return list(found)

    @property
    def trained(self) -> bool:
        """Whether it is learned from documents."""
        return self.kind != "bytes"


def make_tokenizer(settings: TokenizerSettings, texts: Iterable[str], folder: str | Path) -> int:
    """Make the tokenizer and save it as a transformers folder; returns its number of tokens.

    :param texts: documents to learn from; not read by kind bytes.
    :raises ValueError: too little text for the vocabulary asked for.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if settings.kind == "bytes":
        backend = bytes_tokenizer(settings.whole_words)
    elif settings.kind == "bpe":
        assert settings.vocabulary is not None
        backend = bpe_tokenizer(limited(texts, settings.max_bytes), settings.vocabulary)
    else:
        assert settings.vocabulary is not None
        backend, model = sentencepiece_tokenizer(limited(texts, settings.max_bytes), settings.vocabulary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sentencepiece.model").write_bytes(model)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=settings.chat_template,
        extra_special_tokens=list(CONTROLS),
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def bytes_tokenizer(words: Sequence[str]) -> Tokenizer:
    """256 bytes and `words`, each one token wherever it stands between word boundaries.

    The words are in the model's vocabulary, found whole (no merges); they are text, not added tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {data: character for character, data in _bytes_of(alphabet).items()}
    vocabulary = {by_byte[i]: i for i in range(256)}
    for word in words:
        if len(word.encode()) < 2:
            raise ValueError(
                f"tokenizer.words: {word!r} is a single byte, which is a token already; remove it"
            )
        vocabulary["".join(by_byte[b] for b in word.encode())] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    steps: list = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if words:
        longest_first = sorted(words, key=len, reverse=True)
        steps.insert(0, pre_tokenizers.Split(Regex("|".join(map(_whole, longest_first))), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return _with_controls(backend)


def bpe_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE learned from `texts`: 256 bytes and `vocabulary` - 256 merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocabulary:
        raise ValueError(
            f"too few documents for tokenizer.vocabulary={vocabulary}: only {backend.get_vocab_size()} "
            "tokens could be learned; add documents or ask for fewer tokens"
        )
    return _with_controls(backend)


def sentencepiece_tokenizer(texts: Iterable[str], vocabulary: int) -> tuple[Tokenizer, bytes]:
    """A SentencePiece unigram model with byte fallback, as a backend tokenizer and as `.model` bytes.

    Text is not normalised; only U+2581, SentencePiece's own sign for a space, reads back as a space.
    """
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    stream = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=stream,
            vocab_size=vocabulary,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            bos_id=-1,
            eos_id=-1,
            unk_id=0,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece could not learn tokenizer.vocabulary={vocabulary} from the documents: "
            f"{str(error).strip().splitlines()[-1]}"
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    # as in training: a piece never crosses a line's end
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_controls(backend), stream.getvalue()


def limited(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first texts, up to `max_bytes` bytes in all (the last one whole)."""
    seen = 0
    for text in texts:
        if seen >= max_bytes:
            return
        seen += len(text.encode())
        yield text


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most 1,000 characters, as SentencePiece wants them."""
    for text in texts:
        for line in text.splitlines():
            yield from (line[i : i + 1000] for i in range(0, len(line), 1000))


def _whole(word: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return before + re.escape(word) + after


def _bytes_of(alphabet: Sequence[str]) -> dict[str, int]:
    """Which byte each character of the byte-level alphabet stands for: printable ones for themselves."""
    own = {character: ord(character) for character in alphabet if ord(character) < 256}
    missing = [b for b in range(256) if b not in own.values()]
    others = [character for character in alphabet if character not in own]
    return own | dict(zip(others, missing, strict=True))


def _with_controls(backend: Tokenizer) -> Tokenizer:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    return backend
