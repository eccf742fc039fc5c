"""The largest batch that a stage can have: every position, row and latent used, every position with loss."""

from __future__ import annotations

from typing import Any

import torch


def largest_batch(config: Any, pack: Any, micro_batch: int, device: torch.device | str) -> dict[str, Any]:
    """What the model's forward takes, `num_latents` and `num_items_in_batch` included.

    config: the model's. pack: positions D, rows E, latents M. Each row of [micro_batch, D] is one example,
    each encoder row one window; the first M positions are slots.
    """
    row_length = config.geometry().row_length
    positions = torch.arange(pack.positions, device=device).expand(micro_batch, -1)
    rows, latents = pack.rows * micro_batch, pack.latents * micro_batch
    token = torch.arange(row_length, device=device)
    per_row = -(-latents // rows)
    block = torch.arange(rows, device=device)[:, None] * per_row + token * per_row // row_length
    first = torch.arange(micro_batch, device=device)[:, None] * pack.latents
    labels = torch.ones(micro_batch, pack.positions, dtype=torch.long, device=device)
    return {
        "input_ids": torch.zeros_like(labels),
        "position_ids": positions.contiguous(),
        "labels": labels,
        "latent_index": torch.where(positions < pack.latents, positions + first, -1),
        "encoder_input_ids": torch.zeros(rows, row_length, dtype=torch.long, device=device),
        "encoder_position_ids": token.expand(rows, -1).contiguous(),
        "encoder_window_ids": torch.zeros(rows, row_length, dtype=torch.long, device=device),
        "block_index": block.clamp(max=latents - 1),
        "memory_sizes": torch.full((micro_batch,), pack.latents, device=device),
        "num_latents": latents,
        "num_items_in_batch": float(micro_batch * pack.positions),
    }
