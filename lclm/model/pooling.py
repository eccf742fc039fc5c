"""Pooling: encoder states of each block become one vector. One scatter, whatever the ratios."""

from __future__ import annotations

import torch
from torch import Tensor


def place_in_block(block_index: Tensor) -> Tensor:
    """Place of each token in its block, counted from the block's first token in the row.

    block_index: int64 [E, R], -1 for tokens that belong to none. Returns int64 [E, R]; meaningless where -1.
    """
    place = torch.arange(block_index.shape[1], device=block_index.device).expand_as(block_index)
    starts = torch.ones_like(block_index, dtype=torch.bool)
    starts[:, 1:] = block_index[:, 1:] != block_index[:, :-1]
    return place - torch.where(starts, place, 0).cummax(dim=1).values


def pool(hidden: Tensor, block_index: Tensor, num_latents: int, pooling: str, ratio: int) -> Tensor:
    """Pool encoder states into latents before the adapter.

    hidden: [E, R, H]. block_index: int64 [E, R], the latent of each token, -1 not pooled.
    Returns [M, H], for "concat" [M, ratio * H] with zeros behind a short block. Means are taken in fp32.
    Latents of which no token is present are zero, so sums over groups of rows equal one call over all.
    """
    width = hidden.shape[-1]
    states = hidden.reshape(-1, width)
    index = block_index.reshape(-1)
    if pooling == "concat":
        place = place_in_block(block_index).reshape(-1)
        index = torch.where(index >= 0, index * ratio + place, num_latents * ratio)
        return _scatter(states, index, num_latents * ratio).reshape(num_latents, ratio * width)
    index = torch.where(index >= 0, index, num_latents)
    if pooling == "eos":
        return _scatter(states, index, num_latents)
    ones = torch.ones(index.shape, device=index.device)
    counts = torch.zeros(num_latents + 1, device=index.device).index_add_(0, index, ones)[:num_latents]
    sums = _scatter(states.float(), index, num_latents)
    return (sums / counts.clamp_(min=1).unsqueeze(-1)).to(hidden.dtype)


def _scatter(states: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sum of the states of each index; index `rows` is thrown away."""
    return states.new_zeros(rows + 1, states.shape[-1]).index_add(0, index, states)[:rows]
