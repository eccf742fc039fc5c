"""Encoder throughput: one call over packed rows, against one padded call per memory.

Both turn the same memories into latents (encoder, pooling, adapter), forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from common import Matmul, attention_flops, block_weights, in_turns, save, spread
from workload import SIZES, Plain, check_equal, make_model, make_rows, packed

ENCODER_ARRAYS = (
    "encoder_input_ids",
    "encoder_position_ids",
    "encoder_window_ids",
    "block_index",
    "memory_sizes",
)


def measure(name: str, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Rows of the result for one size: forward, and forward with backward."""
    size = SIZES[name]
    model = make_model(size, device, dtype)
    rows = make_rows(size, model.config.geometry(), np.random.default_rng(0))
    batch = packed(rows, size, model.config.geometry(), device)
    plain = Plain(model, rows, size)
    check_equal(model, plain, batch)
    arrays = {key: batch[key] for key in ENCODER_ARRAYS}
    tokens = sum(len(ids) for _, ids, _, _ in plain.memories)
    lengths = [
        min(size.window, len(ids) - start)
        for _, ids, _, _ in plain.memories
        for start in range(0, len(ids), size.window)
    ]
    latents = int(batch["memory_sizes"].sum())
    flops = 2 * block_weights(model.encoder) * tokens + attention_flops(model.encoder.config, lengths)
    flops += 2 * block_weights(model.adapter) * latents

    def ours() -> torch.Tensor:
        return model.encode(**arrays, num_latents=batch["num_latents"])

    def backward(latents: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        latents.float().square().mean().backward()

    def forward_only(call: Any) -> None:
        with torch.no_grad():
            call()

    found = []
    passes = {
        "forward": (1, {"ours": lambda: forward_only(ours), "plain": lambda: forward_only(plain.encode_all)}),
        "forward + backward": (
            3,
            {"ours": lambda: backward(ours()), "plain": lambda: backward(plain.encode_all())},
        ),
    }
    for what, (factor, work) in passes.items():
        matmul = Matmul(device, dtype)
        times = in_turns({**work, "matmul": matmul}, device, rounds)
        rate = matmul.rate(times["matmul"])
        mine, theirs = (statistics.median(times[key]) for key in ("ours", "plain"))
        floor = factor * flops / rate
        found.append(
            {
                "model": name, "pass": what, "memories": len(plain.memories), "tokens": tokens,
                "rows of windows": " x ".join(map(str, arrays["encoder_input_ids"].shape)),
                "lclm ms": mine * 1e3, "plain ms": theirs * 1e3, "speed-up": theirs / mine,
                "lclm tokens/s": tokens / mine, "plain tokens/s": tokens / theirs,
                "floor ms": floor * 1e3, "lclm / floor": mine / floor,
                "GFLOP/s": rate / 1e9,
                "quartiles": {key: spread(value) for key, value in times.items()},
            }
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--name", default="encoder", help="name of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows = [row for name in options.sizes for row in measure(name, device, dtype, options.rounds)]
    notes = [
        "lclm: one call over windows packed into rows. plain: one call per memory, its windows padded to W.",
        "Same weights and memories; losses and gradients of the two are checked equal before timing.",
        f"Medians of {options.rounds} rounds in which the two take turns; {options.dtype}; memory tokens.",
        "Floor: FLOPs of the real tokens at the rate of a large matrix product, timed in turn too (GFLOP/s).",
    ]
    save(options.name, device, rows, notes)


if __name__ == "__main__":
    main()
