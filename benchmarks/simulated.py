"""Simulated data: documents as long as web pages are, and conversations about long memories.

A token is a byte, so that tokenising costs little and lengths in tokens are what is drawn.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer
from lclm.data.settings import SourceSettings
from lclm.data.shards import Kind, Sample, ShardWriter, write_manifest
from lclm.model.spans import Geometry
from lclm.model.text import ContentTokenizer, SpanTokenizer, mark_ids

LONGEST = 100_000


class Texts:
    """Cuts texts of any length from a long one of random letters."""

    def __init__(self, seed: int = 0) -> None:
        self.draws = random.Random(seed)
        self.whole = "".join(self.draws.choices(string.ascii_letters + " ", k=4 * LONGEST))

    def text(self, length: int) -> str:
        start = self.draws.randrange(len(self.whole) - length)
        return self.whole[start : start + length]

    def length(self, mean: float, spread: float, least: int) -> int:
        """Log-normal."""
        return max(least, min(LONGEST, int(self.draws.lognormvariate(mean, spread))))

    def documents(self, count: int, mean: float = 6.8, spread: float = 1.1) -> Iterator[str]:
        """Web pages: 900 tokens in the median, 1,600 on average, up to 100,000."""
        return (self.text(self.length(mean, spread, 16)) for _ in range(count))

    def conversations(
        self, count: int, mean: float = 7.6, spread: float = 0.9
    ) -> Iterator[list[dict[str, Any]]]:
        """A question about a memory (median 2,000 tokens), and an answer (median 150)."""
        for _ in range(count):
            parts = [
                {"type": "memory", "text": self.text(self.length(mean, spread, 16))},
                {"type": "text", "text": self.text(self.length(3.5, 0.7, 4))},
            ]
            answer = self.text(self.length(5.0, 1.0, 4))
            yield [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def write(folder: Path, kind: Kind, items: Iterator[Any], max_bytes: int = 1 << 25) -> SourceSettings:
    """A data set of the items; keys number them."""
    key = "text" if kind == "documents" else "messages"
    with ShardWriter(str(folder), kind=kind, max_bytes=max_bytes) as writer:
        for number, item in enumerate(items):
            writer.write(Sample(f"{kind[0]}{number:07d}", **{key: item}))
    write_manifest(str(folder), name=folder.name, kind=kind, split="train", shards=writer.shards)
    return SourceSettings(str(folder))


class ByteContent(ContentTokenizer):
    """The tokenizer of kind `bytes` on ASCII text, without its cost."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        ids = [super(ByteContent, self).encode(chr(code)) for code in range(128)]
        self._ids = np.array([one[0] for one in ids], np.int32)
        self._codes = {int(number): chr(code) for code, number in enumerate(self._ids)}

    def encode(self, text: str) -> np.ndarray:
        return self._ids[np.frombuffer(text.encode("ascii"), np.uint8)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return self.encode(text), np.arange(len(text))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return "".join(self._codes.get(int(number), "") for number in ids)


class ByteTokenizer(SpanTokenizer):
    """A token is a byte; text is tokenised in no time."""

    def __init__(self, folder: Path) -> None:
        make_tokenizer(TokenizerSettings("bytes"), [], folder)
        super().__init__(AutoTokenizer.from_pretrained(folder))
        self.content = self.encoder_content = ByteContent(self.tokenizer)


def geometry(tokenizer: SpanTokenizer, ratio: int = 16, window: int = 1024) -> Geometry:
    start, end, slot = mark_ids(tokenizer.tokenizer)
    return Geometry(
        ratio=ratio, window=window, memory_start_id=start, memory_end_id=end, memory_id=slot, pad_id=0,
        encoder_pad_id=0, encoder_marker_id=0,
    )  # fmt: skip
