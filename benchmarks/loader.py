"""How many tokens a second one core of the loader makes into batches, against its tokenizer alone.

Data: files of the Python standard library; "web" documents of log-normal length cut from them; conversations
about a memory of log-normal length. Nothing is downloaded. Run from the repository root.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save
from transformers import AutoTokenizer

from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer
from lclm.data.arrays import lay_out_pack, make_batch
from lclm.data.batch import make_lanes
from lclm.data.settings import DataSettings, PackSettings, SourceSettings, TaskSettings
from lclm.data.shards import DataSet, Kind, Sample, ShardWriter, write_manifest
from lclm.model.spans import Geometry
from lclm.model.text import SpanTokenizer, mark_ids


def library() -> list[str]:
    """The standard library's own modules, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py")))
    return [text for text in texts if len(text) > 500]


def web(texts: list[str], count: int, draws: random.Random) -> Iterator[str]:
    """Documents of log-normal length (median 3,600 characters) from random places."""
    whole = "\n".join(texts)
    for _ in range(count):
        length = min(400_000, max(40, int(draws.lognormvariate(8.2, 1.1))))
        start = draws.randrange(len(whole) - length)
        yield whole[start : start + length]


def conversations(
    texts: list[str], count: int, draws: random.Random, mean: float, spread: float
) -> Iterator[list[dict[str, Any]]]:
    """A question about a memory of log-normal length, and an answer."""
    whole = "\n".join(texts)
    for _ in range(count):
        length = max(8, int(draws.lognormvariate(mean, spread)))
        start = draws.randrange(len(whole) - length - 200)
        parts = [
            {"type": "memory", "text": whole[start : start + length]},
            {"type": "text", "text": "What comes next?"},
        ]
        answer = whole[start + length : start + length + draws.randrange(4, 60)]
        yield [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def write(folder: Path, kind: Kind, items: Iterator[Any]) -> SourceSettings:
    key = "text" if kind == "documents" else "messages"
    with ShardWriter(str(folder), kind=kind, max_bytes=1 << 25) as writer:
        for number, item in enumerate(items):
            writer.write(Sample(f"s{number:06d}", **{key: item}))
    write_manifest(str(folder), name=folder.name, kind=kind, split="train", shards=writer.shards)
    return SourceSettings(str(folder))


def cases(folder: Path, texts: list[str]) -> dict[str, tuple[str, int, int, DataSettings]]:
    """Name: (tokenizer kind, ratio, window, settings)."""
    draws = random.Random(0)
    files = write(folder / "files", "documents", iter(texts))
    pages = write(folder / "web", "documents", web(texts, 3000, draws))
    short = write(folder / "short", "conversations", conversations(texts, 3000, draws, 4.4, 0.4))
    long = write(folder / "long", "conversations", conversations(texts, 1200, draws, 9.0, 0.9))
    tiny = DataSettings(
        lanes=8,
        pack=PackSettings(512, 6, 120),
        sources={"documents": files, "conversations": short},
        tasks={
            "interleave": TaskSettings("interleave", "documents", min_span=64, max_span=256),
            "plain": TaskSettings("plain", "documents"),
            "reconstruct": TaskSettings(
                "reconstruct", "documents", min_span=64, max_span=64, prompt="Repeat:"
            ),
            "chat": TaskSettings("chat", "conversations"),
        },
        mixture={"interleave": 0.5, "plain": 0.1, "reconstruct": 0.2, "chat": 0.2},
    )
    large = replace(
        tiny,
        pack=PackSettings(16384, 23, 1656),
        sources={"documents": pages, "conversations": long},
        tasks={
            "interleave": TaskSettings("interleave", "documents"),
            "plain": TaskSettings("plain", "documents"),
            "chat": TaskSettings("chat", "conversations"),
        },
        mixture={"interleave": 0.6, "plain": 0.1, "chat": 0.3},
    )
    alone = replace(large, pack=PackSettings(16384, 16, 1152), mixture={"interleave": 1.0})
    return {
        "bytes, packs of 512, all tasks": ("bytes", 4, 64, tiny),
        "BPE, packs of 16,384, web and conversations": ("bpe", 16, 1024, large),
        "BPE, packs of 16,384, interleave alone": ("bpe", 16, 1024, alone),
    }


def read_with(folder: Path, kind: str, texts: list[str]) -> SpanTokenizer:
    path = folder / f"tokenizer-{kind}"
    if not path.exists():
        make_tokenizer(TokenizerSettings(kind, vocabulary=8192 if kind == "bpe" else None), texts, path)
    return SpanTokenizer(AutoTokenizer.from_pretrained(path))


def floor(tokenizer: SpanTokenizer, path: str, most: int = 3_000_000) -> float:
    """Tokens a second of the tokenizer alone, on the documents' text in pieces of a span's usual size."""
    texts, size = [], 0
    for sample in DataSet.open(path):
        texts += [sample.text[i : i + 4000] for i in range(0, len(sample.text or ""), 4000)]
        size += len(sample.text or "")
        if size > most:
            break
    begin, tokens = time.process_time(), 0
    for text in texts:
        tokens += len(tokenizer.content.encode(text))
    return tokens / (time.process_time() - begin)


def measure(
    name: str, tokenizer: SpanTokenizer, ratio: int, window: int, data: DataSettings, packs: int
) -> dict:
    start, end, slot = mark_ids(tokenizer.tokenizer)
    geometry = Geometry(
        ratio=ratio, window=window, memory_start_id=start, memory_end_id=end, memory_id=slot, pad_id=0,
        encoder_pad_id=0, encoder_marker_id=0,
    )  # fmt: skip
    options: dict[str, Any] = {"seed": 0, "mixture": data.mixture, "ratios": [4, 8] if ratio == 4 else None}
    (lane,) = make_lanes(data, tokenizer, geometry, [0], **options)
    names, capacity = list(data.tasks), None
    for _ in range(3):
        lane.next_pack()
    gc.collect()
    gc.freeze()
    times, used, tokens, cursor = [], [], 0, {}
    for _ in range(packs):
        begin = time.process_time()
        pack = lane.next_pack()
        batch = make_batch(
            [lay_out_pack(pack, names, data.pack, geometry)], names, data.pack, geometry.row_length
        )
        times.append(time.process_time() - begin)
        used.append(pack.used)
        tokens += sum(pack.source_tokens.values())
        capacity, cursor = batch.capacity, pack.cursor
    begin = time.process_time()
    make_lanes(data, tokenizer, geometry, [0], cursors={"0": cursor}, **options)[0].next_pack()
    resumed = time.process_time() - begin
    fill = np.array(used).mean(0) / np.array(capacity)
    per_token = floor(tokenizer, data.sources["documents"].path)
    speed = tokens / sum(times)
    return {
        "data": name,
        "ms a pack": statistics.median(times) * 1e3,
        "source tokens/s a core": speed,
        "tokenizer alone, tokens/s": per_token,
        "share of the floor": speed / per_token,
        "positions filled": float(fill[0]),
        "row tokens filled": float(fill[1]),
        "latents filled": float(fill[2]),
        "ms to resume and pack": resumed * 1e3,
        "bytes of a cursor": len(json.dumps(cursor)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=300, help="packs of 512; of 16,384 an eighth of it")
    parser.add_argument("--name", default="loader", help="name of the result files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = library()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name, (kind, ratio, window, data) in cases(Path(folder), texts).items():
            tokenizer = read_with(Path(folder), kind, texts)
            packs = options.packs if data.pack.positions < 4096 else max(8, options.packs // 8)
            rows.append(measure(name, tokenizer, ratio, window, data, packs))
    notes = [
        "One lane, in the process itself: reading, tokenising, packing, laying out, making tensors.",
        "Source tokens: before compression. A text that is cut is tokenised twice (where it may be cut, and "
        "the cut spans as at inference), so half of the tokenizer's own speed is the most there is.",
        "Filled: mean share of a pack's positions, row tokens and latents that are real; the rest is "
        "padding.",
    ]
    save(options.name, torch.device("cpu"), rows, notes)


if __name__ == "__main__":
    main()
