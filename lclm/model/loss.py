"""Next-token loss on loss-bearing positions only, without ever holding the logits of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .spans import NO_LOSS

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except ImportError:
    LigerFusedLinearCrossEntropyLoss = None

CPU_LOGITS = 2**24
CUDA_LOGITS = 2**26


def scale_logits(logits: Tensor, config: Any) -> Tensor:
    """What some decoders do to their logits after the head: Granite and Cohere scale, Gemma 2 caps."""
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def next_token_loss(
    hidden: Tensor, labels: Tensor, head: nn.Module, config: Any, max_logits: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of the labels, and that of each label.

    hidden: [B, D, K], the decoder's final states. labels: int64 [B, D], the token at each position or -100;
    the state before it predicts it. head: the decoder's output embeddings. max_logits: logits held at once.
    Returns (sum, fp32 scalar; losses, fp32 [n] in row-major order of the labels, detached, or None where the
    fused kernel does not give them).
    """
    targets = labels[:, 1:]
    rows, columns = (targets != NO_LOSS).nonzero(as_tuple=True)
    return label_losses(hidden[rows, columns], targets[rows, columns], head, config, max_logits)


def label_losses(
    states: Tensor, targets: Tensor, head: nn.Module, config: Any, max_logits: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """`next_token_loss` of the states [n, K] that predict the targets, int64 [n]."""
    if _can_fuse(states, head, config):
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return fused(head.weight, states, targets, getattr(head, "bias", None)).float(), None
    if max_logits is None:
        max_logits = CPU_LOGITS if states.device.type == "cpu" else CUDA_LOGITS
    size = max(1, max_logits // config.vocab_size)
    if len(states) <= size:
        losses = _losses(states, targets, head, config)
        return losses.sum(), losses.detach()
    parts = [
        checkpoint(_losses, states[i : i + size], targets[i : i + size], head, config, use_reentrant=False)
        for i in range(0, len(states), size)
    ]
    losses = torch.cat(parts)
    return losses.sum(), losses.detach()


def _losses(states: Tensor, targets: Tensor, head: nn.Module, config: Any) -> Tensor:
    logits = scale_logits(head(states), config).float()
    return functional.cross_entropy(logits, targets, reduction="none")


def _can_fuse(states: Tensor, head: nn.Module, config: Any) -> bool:
    """Liger serves plain linear heads on CUDA whose weight is whole (ZeRO-3 partitions it) and not
    adapted."""
    scaled = any(
        getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
    )
    return (
        LigerFusedLinearCrossEntropyLoss is not None
        and states.is_cuda
        and len(states) > 0
        and type(head) is nn.Linear
        and not scaled
        and not hasattr(head.weight, "ds_id")
    )
