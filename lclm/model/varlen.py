"""Attention over segments: a kernel is told where each window or example ends and does no work between them.

The same function serves every such kernel. Without segments (a cache, a padded prompt) it is sdpa.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

Kernel = Callable[..., Tensor]
"""kernel(query [T, heads, d], key [T, kv heads, d], value, cumulative int32 [n + 1], longest, scale=,
window=) -> [T, heads, d]. Segment i is positions cumulative[i] up to cumulative[i + 1], `longest` at most;
window (left, right) is how far a position sees within its segment, -1 without bound."""

REGISTERED: set[str] = set()
"""Names given to `register_kernel`."""
_HALF = (torch.bfloat16, torch.float16)


def register_kernel(name: str, kernel: Kernel) -> None:
    """Offer `kernel` to every model of this process as the attention implementation `name`."""
    AttentionInterface.register(name, partial(attend, kernel=kernel, name=name))
    AttentionMaskInterface.register(name, sdpa_mask)
    REGISTERED.add(name)


def by_segments(name: str) -> bool:
    """Whether an implementation takes segments in place of a mask."""
    return name == "flash_attention_2" or name in REGISTERED


def segment_arguments(groups: Tensor, causal: bool, implementation: str) -> dict[str, Any]:
    """What a transformers model takes so that a position sees its own run of equal numbers in `groups` only.

    groups: int64 [B, L]; rows are laid end to end. The lengths are read back from the device once.
    """
    starts = torch.ones_like(groups, dtype=torch.bool)
    starts[:, 1:] = groups[:, 1:] != groups[:, :-1]
    ends = torch.cat([starts.flatten().nonzero().squeeze(1), groups.new_tensor([groups.numel()])])
    longest = int(ends.diff().max())
    cumulative = ends.to(torch.int32)
    arguments = {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
        "is_causal": causal,
    }
    if implementation in REGISTERED:
        # Four dimensions: transformers hands it on and makes no mask of its own; nothing reads it.
        arguments["attention_mask"] = groups.new_ones((1, 1, 1, 1), dtype=torch.bool)
    return arguments


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Kernel,
    name: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function around `kernel`. query: [B, heads, L, d]; returns [B, L, heads, d].

    Raises ValueError for what kernels over segments do not do: dropout, capped scores, sinks.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
        )
    if dropout or others.get("softcap") is not None or others.get("s_aux") is not None:
        raise ValueError(
            f"attention {name!r} has no attention dropout, capped scores or sinks, and "
            f"{type(module).__name__} wants one; use model.attention=sdpa (eager where it caps scores)"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    reach = -1 if sliding_window is None else sliding_window - 1
    rows, _, length, _ = query.shape
    states = kernel(
        *(part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)),
        cu_seq_lens_q,
        max_length_q,
        scale=scaling,
        window=(reach, 0 if causal else reach),
    )
    return states.unflatten(0, (rows, length)), None


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative: Tensor,
    longest: int,
    *,
    scale: float | None,
    window: tuple[int, int],
) -> Tensor:
    """torch's own kernel; CUDA, bf16 or fp16."""
    if query.device.type != "cuda" or query.dtype not in _HALF:
        raise ValueError(
            f"attention 'varlen' computes in bf16 or fp16 on CUDA, and was given {query.dtype} on "
            f"{query.device.type}; set engine.precision=bf16, or model.attention=sdpa"
        )
    return varlen_attn(
        query,
        key,
        value,
        cumulative,
        cumulative,
        longest,
        longest,
        scale=scale,
        window_size=window,
        enable_gqa=key.shape[1] != query.shape[1],
    )


register_kernel("varlen", varlen)


def missing(name: str) -> str | None:
    """What this machine lacks for an implementation, and what to install; None if nothing."""
    if name not in ("varlen", "flash_attention_2"):
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA device, and there is none; use auto or sdpa"
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "install it with `pip install flash-attn --no-build-isolation`, or use auto, varlen or sdpa"
    if name == "varlen":
        known = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}
        if not {"window_size", "enable_gqa", "scale"} <= set(known):
            return f"torch {torch.__version__} has no varlen_attn with windows; install torch >= 2.13"
    return None


def unserved(name: str, config: Any) -> str | None:
    """What a model of `config` wants that a kernel over segments does not do; None if nothing."""
    if name not in REGISTERED:
        return None
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for key in ("attn_logit_softcapping", "attention_dropout", "attention_probs_dropout_prob"):
        if getattr(config, key, None):
            return f"{config.model_type} has {key} {getattr(config, key)}"
    if name == "varlen" and (width % 8 or width > 256):
        return f"{config.model_type} has heads of {width}; the kernel takes multiples of 8 up to 256"
    return None
