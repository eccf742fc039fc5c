"""FLOPs of a pack's forward pass in a model's encoder, decoder and loss, from what the pack holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def matmul(config: Mapping[str, Any]) -> int:
    """FLOPs of all layers' matrices for one token."""
    width, head = config["hidden_size"], config["head_dim"]
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    attention = width * (heads + 2 * pairs) * head + heads * head * width
    return 2 * config["num_hidden_layers"] * (attention + 3 * width * config["intermediate_size"])


def attention(config: Mapping[str, Any]) -> int:
    """FLOPs of all layers' causal scores and mixtures, to be multiplied by the square of a length."""
    return 2 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]


def works(model: Any, figures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """FLOPs by part from the figures of packs (fleet.FIGURES), of their shape. Padding costs nothing here.

    model: the recipe's `model`. A backward pass costs twice a forward in all parts, and changes no ratio of
    one of them; the adapter's work is below 1%.
    """
    encoder, decoder = model.encoder.config, model.decoder.config
    read = figures["row_tokens"] * matmul(encoder) + figures["window_squares"] * attention(encoder)
    written = figures["positions"] * matmul(decoder) + figures["squares"] * attention(decoder)
    loss = figures["loss_tokens"] * 2 * decoder["vocab_size"] * decoder["hidden_size"]
    return {
        "encoder": read,
        "decoder": written,
        "encoder + decoder": read + written,
        "with the loss": read + written + loss,
    }
