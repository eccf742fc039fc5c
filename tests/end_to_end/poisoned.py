"""A run on easy text with one document of garbage in it, whose loss stands far above all others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer
from lclm.data.shards import Sample, ShardWriter, write_manifest
from tests.end_to_end import small_run as small

DOCUMENTS, GARBAGE = 120, 90
KEY = f"d{GARBAGE:03d}"


def build_data(folder: Path) -> Path:
    """Documents of a few words again and again, one of random signs among them."""
    draws = random.Random(1)
    words = ["the cat sat on the mat", "and the dog ran", "over the hill", "to see the sun"]
    target = str(folder / "documents" / "train")
    with ShardWriter(target, kind="documents", max_bytes=40_000) as writer:
        for number in range(DOCUMENTS):
            text = " ".join(draws.choice(words) for _ in range(36))
            if number == GARBAGE:
                text = "".join(chr(draws.randrange(0x4E00, 0x9FFF)) for _ in range(250))
            writer.write(Sample(f"d{number:03d}", text=text))
    write_manifest(target, name="documents", kind="documents", split="train", shards=writer.shards)
    make_tokenizer(TokenizerSettings(kind="bytes"), [], folder / "tokenizer")
    return folder


def recipe(data: Path, run: Path, steps: int = 30, **train: Any) -> dict[str, Any]:
    """Interleaved text in two lanes, checkpoints every five steps, no probes."""
    content = small.recipe(data, run, only=small.stage(steps))
    for component in content["stages"]["only"]["learn"].values():
        component["lr"] = 1e-2
    content["data"] |= {"lanes": 2, "micro_batch": 1, "mixture": {"interleave": 1.0}, "heldout": {}}
    content["data"]["sources"].pop("conversations")
    content["data"]["tasks"] = {"interleave": content["data"]["tasks"]["interleave"]}
    content["train"] |= {"validate_batches": 0, "validate_every": None} | train
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return content


def spike(**settings: Any) -> dict[str, Any]:
    """`train.spike` for a run this short, whose loss still falls."""
    return {"window_steps": 6, "sigmas": 3.0, "factor": 1.2} | settings
