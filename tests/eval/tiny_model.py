"""A very small model with random weights and its processor, and some held-out material."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer
from lclm.model import LCLMConfig, LCLMForConditionalGeneration, LCLMProcessor

LAYERS = {
    "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
}  # fmt: skip


def make(folder: Path, **settings: Any) -> tuple[LCLMForConditionalGeneration, LCLMProcessor]:
    """A model for 4x and 8x over bytes."""
    make_tokenizer(TokenizerSettings(kind="bytes"), [], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("memory_start", "memory", "memory_end")
    }
    layers = {**LAYERS, "vocab_size": len(tokenizer)}
    config = LCLMConfig(
        encoder_config=layers, decoder_config=layers, ratio=4, ratios=[4, 8], window=32,
        memory_start_id=ids["memory_start"], memory_id=ids["memory"], memory_end_id=ids["memory_end"],
        pad_id=tokenizer.pad_token_id, encoder_pad_id=tokenizer.pad_token_id,
        encoder_marker_id=tokenizer.pad_token_id, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LCLMForConditionalGeneration(config).train()
    return model, LCLMProcessor(tokenizer, tokenizer, config.geometry())


def documents(count: int, length: int = 400, seed: int = 0) -> list[str]:
    """Texts of words, some with characters of several bytes."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "naïve", "delta", "日本", "return", "x = 1", "🙂"]
    return [" ".join(rng.choice(words) for _ in range(length // 5)) for _ in range(count)]


def conversations(count: int, seed: int = 0) -> list[list[dict]]:
    """One number planted in a memory and asked for."""
    rng = random.Random(seed)
    found = []
    for text in documents(count, 60, seed):
        number = f"{rng.randrange(100_000):05d}"
        parts = [
            {"type": "memory", "text": f"{text} The number is {number}. {text[:20]}"},
            {"type": "text", "text": "What is the number?"},
        ]
        found.append([{"role": "user", "content": parts}, {"role": "assistant", "content": number}])
    return found
