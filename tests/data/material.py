"""Small tokenizers and data sets for the tests of lclm.data."""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lclm.data.shards import Sample, ShardWriter, write_manifest
from lclm.model.spans import Geometry
from lclm.model.text import MARKS, SpanTokenizer, mark_ids

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROLS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", *MARKS]


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS[1:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrapped(backend)


@cache
def bpe_tokenizer(size: int = 2000) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on some of the standard library."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(stdlib_texts(12), trainer)
    return _wrapped(backend)


@cache
def span_tokenizer(decoder: str = "bytes", encoder: str | None = None) -> SpanTokenizer:
    make = {"bytes": byte_tokenizer, "bpe": bpe_tokenizer, "bpe-small": lambda: bpe_tokenizer(700)}
    return SpanTokenizer(make[decoder](), make[encoder]() if encoder else None)


def geometry(tokenizer: SpanTokenizer, **settings: Any) -> Geometry:
    start, end, slot = mark_ids(tokenizer.tokenizer)
    pad = tokenizer.end_of_text_id
    ids = {"memory_start_id": start, "memory_end_id": end, "memory_id": slot, "pad_id": pad}
    return Geometry(**ids, encoder_pad_id=0, encoder_marker_id=0, **settings)


@cache
def stdlib_texts(count: int = 60) -> tuple[str, ...]:
    """Some files of the standard library, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py")))
    return tuple(text for text in texts if 500 < len(text) < 60_000)[:count]


@cache
def words() -> tuple[str, ...]:
    return tuple(word for text in stdlib_texts(12) for word in text.split())


def web_documents(count: int, seed: int = 0, mean: float = 6.8, spread: float = 1.1) -> list[str]:
    """Documents of log-normal length in words, as web text has."""
    draws = random.Random(seed)
    vocabulary = words()
    texts = []
    for _ in range(count):
        length = max(4, min(20_000, int(draws.lognormvariate(mean, spread))))
        start = draws.randrange(len(vocabulary))
        texts.append(" ".join(vocabulary[(start + i) % len(vocabulary)] for i in range(length)))
    return texts


def conversation(draws: random.Random, mean: float, spread: float) -> list[dict[str, Any]]:
    """A question about a memory of log-normal length, and its answer."""
    vocabulary = words()
    length = max(4, int(draws.lognormvariate(mean, spread)))
    start = draws.randrange(len(vocabulary))
    memory = " ".join(vocabulary[(start + i) % len(vocabulary)] for i in range(length))
    answer = " ".join(draws.choice(vocabulary) for _ in range(draws.randrange(1, 30)))
    parts = [{"type": "memory", "text": memory}, {"type": "text", "text": "What does it say?"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def conversations(count: int, seed: int = 0, mean: float = 3.2, spread: float = 0.5) -> list[Any]:
    draws = random.Random(seed)
    return [conversation(draws, mean, spread) for _ in range(count)]


def write_documents(folder: Path, texts: list[str] | tuple[str, ...], max_bytes: int = 200_000) -> str:
    """A documents data set; returns its path."""
    with ShardWriter(str(folder), kind="documents", max_bytes=max_bytes) as writer:
        for number, text in enumerate(texts):
            writer.write(Sample(f"d{number:05d}", text=text))
    write_manifest(str(folder), name="documents", kind="documents", split="train", shards=writer.shards)
    return str(folder)


def write_conversations(folder: Path, items: list[Any], max_bytes: int = 200_000) -> str:
    """A conversations data set; returns its path."""
    with ShardWriter(str(folder), kind="conversations", max_bytes=max_bytes) as writer:
        for number, messages in enumerate(items):
            writer.write(Sample(f"c{number:05d}", messages=messages))
    write_manifest(
        str(folder), name="conversations", kind="conversations", split="train", shards=writer.shards
    )
    return str(folder)
