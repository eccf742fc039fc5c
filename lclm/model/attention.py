"""Which tokens see which: block masks in the form that each attention implementation wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_torch_flex_attn_available

from .varlen import REGISTERED, by_segments, missing, segment_arguments, unserved

if is_torch_flex_attn_available():
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "varlen")
"""Attention implementations offered. The last two skip what a position cannot see; they need CUDA and half
precision."""


def resolve(name: str) -> str:
    """The implementation that `model.attention` names, wherever it will run: "auto" is sdpa.

    Training resolves "auto" beforehand (`best`). ValueError for a name that is not offered.
    """
    if name == "auto":
        return "sdpa"
    if name not in IMPLEMENTATIONS and name not in REGISTERED:
        raise ValueError(f"attention {name!r} is not offered; choose auto, {', '.join(IMPLEMENTATIONS)}")
    if name == "flex_attention" and not is_torch_flex_attn_available():
        raise ValueError(
            "attention 'flex_attention' is not available in this torch; install torch >= 2.5 or use sdpa"
        )
    return name


def require(name: str, *configs: Any) -> str:
    """`resolve(name)`; ValueError where this machine lacks it or models of `configs` cannot run with it."""
    found = resolve(name)
    problem = missing(found) or next((why for c in configs if (why := unserved(found, c))), None)
    if problem:
        raise ValueError(f"attention {name!r} cannot be used: {problem}")
    return found


def best(precision: str, *configs: Any) -> str:
    """What "auto" is in training: the first kernel that skips masked work and can run here, else sdpa.

    precision: "bf16" or "fp32". configs: of the models that it must serve.
    """
    for name in ("flash_attention_2", "varlen") if precision == "bf16" else ():
        if not missing(name) and not any(unserved(name, config) for config in configs):
            return name
    return "sdpa"


def segments(position_ids: Tensor) -> Tensor:
    """Number of the example that each position belongs to: a new one wherever positions do not count on by
    one.

    position_ids: int64 [B, D]. Returns int64 [B, D].
    """
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(breaks.cumsum(1), (1, 0))


def attention_arguments(config: Any, groups: Tensor, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What a model of `config` takes beside its inputs so that a position sees those of its own group only.

    groups: int64 [B, L]; a group is a run of neighbours. Made once per call of the model: a mask, or where
    each segment ends. causal: only earlier ones and itself.
    """
    _check_layers(config)
    if by_segments(config._attn_implementation):
        return segment_arguments(groups, causal, config._attn_implementation)
    return {"attention_mask": layer_masks(config, groups, causal, dtype)}


def _check_layers(config: Any) -> set[str]:
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.model_type} has layers of kind {sorted(kinds)}; "
            "only full and sliding attention can be packed"
        )
    return kinds


def layer_masks(config: Any, groups: Tensor, causal: bool, dtype: torch.dtype) -> Any:
    """The mask argument for a model of `config`: one mask, or one per kind of layer where there are
    several."""
    kinds = _check_layers(config)
    implementation = config._attn_implementation
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds:
        return {
            "full_attention": block_mask(groups, causal, implementation, dtype),
            "sliding_attention": block_mask(groups, causal, implementation, dtype, window),
        }
    return block_mask(groups, causal, implementation, dtype, None if kinds else window)


def block_mask(
    groups: Tensor, causal: bool, implementation: str, dtype: torch.dtype, window: int | None = None
) -> Any:
    """Mask under which a position sees those of its own group (only earlier ones and itself if causal).

    groups: int64 [B, L]. window: reach of a sliding layer: the latest `window` positions if causal, else that
    many on either side. Returns bool [B, 1, L, L] for sdpa, additive float for eager, a BlockMask for flex.
    """
    if implementation == "flex_attention":
        return _flex_mask(groups, causal, window)
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"no mask for attention {implementation!r}; choose {', '.join(IMPLEMENTATIONS)}")
    mask = groups[:, None, :, None] == groups[:, None, None, :]
    length = groups.shape[1]
    if causal:
        allowed = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril_()
        mask &= allowed.triu_(1 - window) if window is not None else allowed
    elif window is not None:
        mask &= (
            torch.ones(length, length, dtype=torch.bool, device=groups.device).tril_(window).triu_(-window)
        )
    if implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _flex_mask(groups: Tensor, causal: bool, window: int | None) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = groups[batch, query] == groups[batch, key]
        if causal:
            seen = seen & (query >= key)
        if window is not None:
            seen = seen & ((query - key).abs() < window + (not causal))
        return seen

    rows, length = groups.shape
    return create_block_mask(visible, rows, None, length, length, device=groups.device)
