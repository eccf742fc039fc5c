"""A plain attention kernel over segments, one by one: what the fast ones must equal."""

import itertools

import torch
from torch.nn import functional

from lclm.model.varlen import register_kernel

NAME = "per_segment"


def per_segment(query, key, value, cumulative, longest, *, scale, window):
    """Same arguments as the kernels of lclm.model.varlen; checks that the segments are what they must be."""
    bounds = cumulative.tolist()
    assert cumulative.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == len(query) == len(key) == len(value)
    assert max(b - a for a, b in itertools.pairwise(bounds)) == longest
    parts = []
    for begin, end in itertools.pairwise(bounds):
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        left, right = window
        mask = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            mask &= distance <= left
        if right >= 0:
            mask &= distance >= -right
        parts.append(
            functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        )
    return torch.cat(parts, 1).transpose(0, 1)


register_kernel(NAME, per_segment)
