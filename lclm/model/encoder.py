"""Running any AutoModel over rows of windows, and pooling its states, in bounded groups of rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attention_arguments
from .configuration import LCLMConfig
from .pooling import pool


class RowEncoder:
    """How one encoder is called: which arguments it takes, whether it is causal by itself. Holds no
    weights."""

    def __init__(self, encoder: nn.Module, config: LCLMConfig) -> None:
        self.config = config
        self.native_causal = any(getattr(module, "is_causal", False) for module in encoder.modules())
        parameters = inspect.signature(encoder.forward).parameters
        self.extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        self.offset = config.encoder_position_offset

    def __call__(
        self,
        encoder: nn.Module,
        block_position: nn.Module | None,
        input_ids: Tensor,
        position_ids: Tensor,
        window_ids: Tensor,
        block_index: Tensor,
        num_latents: int,
    ) -> Tensor:
        """Pooled states of all latents, [M, H] ([M, N * H] for concat). Arrays are int64 [E, R]."""
        rows = input_ids.shape[0]
        group = self.config.max_rows_per_forward or max(rows, 1)
        pooled: Tensor | None = None
        for start in range(0, rows, group):
            part = slice(start, start + group)
            hidden = self._run(
                encoder,
                block_position,
                input_ids[part],
                position_ids[part],
                window_ids[part],
                block_index[part],
            )
            states = pool(hidden, block_index[part], num_latents, self.config.pooling, self.config.ratio)
            pooled = states if pooled is None else pooled + states
        assert pooled is not None, "the encoder needs at least one row"
        return pooled

    def _run(
        self,
        encoder: nn.Module,
        block_position: nn.Module | None,
        input_ids: Tensor,
        position_ids: Tensor,
        window_ids: Tensor,
        block_index: Tensor,
    ) -> Tensor:
        inputs: dict[str, Any] = dict(self.extra)
        embed = encoder.get_input_embeddings()
        if block_position is None:
            inputs["input_ids"] = input_ids
        else:
            inputs["inputs_embeds"] = embed(input_ids) + block_position(block_index)
        if self._needs_mask(window_ids):
            causal = not self.config.bidirectional
            inputs |= attention_arguments(encoder.config, window_ids, causal, _dtype(embed))
            inputs["position_ids"] = position_ids + self.offset
        return encoder(**inputs).last_hidden_state

    def _needs_mask(self, window_ids: Tensor) -> bool:
        if self.config.bidirectional or not self.native_causal:
            return True
        return bool(((window_ids != window_ids[:, :1]) & (window_ids >= 0)).any())


def _dtype(module: nn.Module) -> torch.dtype:
    """Without touching `module.weight`, which sharded engines would gather, on some processes only."""
    return next(module.parameters()).dtype
