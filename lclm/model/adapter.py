"""Adapters: from pooled encoder states to latents in the decoder's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-6
_TILE = 2048


class AdapterAttention(nn.Module):
    """One pre-norm attention layer over the latents of each memory: bidirectional, rotary positions from
    0."""

    def __init__(self, width: int, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = max(1, width // head_dim)
        while width % self.heads or (width // self.heads) % 2:
            self.heads -= 1
            if self.heads == 0:
                raise ValueError(f"an attention adapter needs an even width, got {width}")
        self.norm = nn.RMSNorm(width, eps=_EPS)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, latents: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """latents [M, width]; memory, position: int64 [M], which memory a latent is of and its place in
        it."""
        states = self.norm(latents)
        shape = (len(latents), self.heads, latents.shape[1] // self.heads)
        query, key = (_rotate(proj(states).view(shape), position) for proj in (self.q_proj, self.k_proj))
        value = self.v_proj(states).view(shape).transpose(0, 1)
        key = key.transpose(0, 1)
        tiles = []
        for start in range(0, max(len(latents), 1), _TILE):
            tile = slice(start, start + _TILE)
            mask = memory[tile, None] == memory[None, :]
            attended = functional.scaled_dot_product_attention(
                query[tile].transpose(0, 1)[None], key[None], value[None], attn_mask=mask
            )
            tiles.append(attended[0].transpose(0, 1))
        return latents + self.o_proj(torch.cat(tiles).reshape(latents.shape))


def _rotate(states: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding, theta 10,000. states: [M, heads, head_dim]."""
    half = states.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=states.device, dtype=torch.float32) / half)
    angles = position[:, None, None].float() * rates
    first, second = states.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)


class Adapter(nn.Module):
    """mlp: RMSNorm, linear, GELU, linear; attn_mlp: attention layers before it; mlp_attn: after it."""

    def __init__(self, kind: str, width_in: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.kind = kind
        if layers:
            attention_width = width_in if kind == "attn_mlp" else width
            self.attention_layers = nn.ModuleList(AdapterAttention(attention_width) for _ in range(layers))
        self.norm = nn.RMSNorm(width_in, eps=_EPS)
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, pooled: Tensor, memory_sizes: Tensor | None) -> Tensor:
        """pooled [M, width_in] -> latents [M, width]. memory_sizes: int64 [n], latents per memory in
        order."""
        if self.kind == "mlp":
            return self._mlp(pooled)
        if memory_sizes is None:
            raise ValueError(f"adapter {self.kind!r} needs memory_sizes, the latents of each memory")
        memory, position = places(memory_sizes, len(pooled))
        if self.kind == "mlp_attn":
            pooled = self._mlp(pooled)
        for layer in self.attention_layers:
            pooled = layer(pooled, memory, position)
        return pooled if self.kind == "mlp_attn" else self._mlp(pooled)

    def _mlp(self, states: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(self.norm(states))))

    @torch.no_grad()
    def start_as_identity(self, scale: float) -> None:
        """Set the MLP to x -> scale * norm(x): gelu(x) - gelu(-x) = x.

        Where the widths differ, the first min(width_in, width) places are copied and the rest start at zero.
        """
        width_in, width = self.fc1.in_features, self.fc2.out_features
        eye = torch.eye(width, width_in, dtype=self.fc1.weight.dtype, device=self.fc1.weight.device)
        self.norm.weight.fill_(scale)
        self.fc1.weight.copy_(torch.cat([eye, -eye]))
        eye = torch.eye(width, dtype=self.fc2.weight.dtype, device=self.fc2.weight.device)
        self.fc2.weight.copy_(torch.cat([eye, -eye], dim=1))
        self.fc1.bias.zero_()
        self.fc2.bias.zero_()


def places(memory_sizes: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
    """(memory of each latent, its position in it), int64 [M]; latents beyond the sizes form one memory of
    padding."""
    ends = memory_sizes.cumsum(0)
    number = torch.arange(num_latents, device=memory_sizes.device)
    memory = torch.searchsorted(ends, number, right=True)
    starts = functional.pad(ends, (1, 0))
    return memory, number - starts[memory]
