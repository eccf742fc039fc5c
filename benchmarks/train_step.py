"""Training steps: packed with fixed shapes, against a plain padded per-sample loop.

A step is forward, backward, clipping and AdamW, on one process. Also where the time of a step goes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Matmul, attention_flops, block_weights, in_turns, save, spread
from workload import SIZES, Plain, check_equal, make_model, make_rows, packed, source_tokens

from lclm.model.attention import layer_masks, segments
from lclm.model.loss import next_token_loss
from lclm.model.spans import Example, Geometry


def flops_of_step(model: Any, rows: list[list[Example]], geometry: Geometry, window: int) -> float:
    """FLOPs of forward and backward (thrice forward) over real tokens; logits only where there is loss."""
    examples = [example for row in rows for example in row]
    memories = [span for e in examples for span in e.spans if span.kind == "memory"]
    tokens = sum(len(span.ids) for span in memories)
    windows = [min(window, len(s.ids) - start) for s in memories for start in range(0, len(s.ids), window)]
    positions = [geometry.size(example).positions for example in examples]
    latents = sum(geometry.size(example).latents for example in examples)
    loss = sum(len(span.ids) for e in examples for span in e.spans if span.loss)
    forward = 2 * block_weights(model.encoder) * tokens + attention_flops(model.encoder.config, windows)
    forward += 2 * block_weights(model.adapter) * latents
    forward += 2 * block_weights(model.decoder.base_model) * sum(positions)
    forward += attention_flops(model.decoder.config, positions)
    forward += 2 * model.decoder.config.vocab_size * model.decoder.config.hidden_size * loss
    return 3.0 * forward


def parts_of_step(model: Any, batch: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Encoder, adapter, decoder and loss, forward and backward, on the batch's own shapes and masks."""
    with torch.no_grad():
        latents = model.encode(
            batch["encoder_input_ids"], batch["encoder_position_ids"], batch["encoder_window_ids"],
            batch["block_index"], batch["memory_sizes"], batch["num_latents"],
        )  # fmt: skip
        inputs = model.embed(batch["input_ids"], batch["latent_index"], latents)
        rows = model.encoder.get_input_embeddings()(batch["encoder_input_ids"])
    encoder_mask = layer_masks(model.encoder.config, batch["encoder_window_ids"], True, rows.dtype)
    mask = layer_masks(model.decoder.config, segments(batch["position_ids"]), True, inputs.dtype)
    gradient, states = torch.randn_like(rows), torch.randn_like(inputs)

    def encoder() -> None:
        hidden = model.encoder(
            inputs_embeds=rows.detach().requires_grad_(), attention_mask=encoder_mask,
            position_ids=batch["encoder_position_ids"], use_cache=False,
        ).last_hidden_state  # fmt: skip
        hidden.backward(gradient)

    def decoder() -> None:
        hidden = model.decoder.base_model(
            inputs_embeds=inputs.detach().requires_grad_(), attention_mask=mask,
            position_ids=batch["position_ids"], use_cache=False,
        ).last_hidden_state  # fmt: skip
        hidden.backward(states)

    def loss() -> None:
        head = model.get_output_embeddings()
        hidden = states.detach().requires_grad_()
        next_token_loss(hidden, batch["labels"], head, model.decoder.config)[0].backward()

    pooled = torch.randn(batch["num_latents"], model.adapter.fc1.in_features).to(inputs)
    upstream = torch.randn_like(latents)

    def adapter() -> None:
        model.adapter(pooled.detach().requires_grad_(), batch["memory_sizes"]).backward(upstream)

    return {"encoder": encoder, "adapter": adapter, "decoder": decoder, "loss": loss}


def measure(name: str, device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[dict, dict]:
    """(throughput, shares of the time) of one size."""
    size = SIZES[name]
    model = make_model(size, device, dtype)
    geometry = model.config.geometry()
    rows = make_rows(size, geometry, np.random.default_rng(0))
    batch = packed(rows, size, geometry, device)
    plain = Plain(model, rows, size)
    check_equal(model, plain, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    parameters = list(model.parameters())

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def passes() -> None:
        model(**batch).loss.backward()

    def step() -> None:
        passes()
        update()

    def plain_step() -> None:
        plain.loss().backward()
        update()

    matmul = Matmul(device, dtype)
    work = {"ours": step, "plain": plain_step, "matmul": matmul, "passes": passes}
    times = in_turns({**work, **parts_of_step(model, batch), "update": update}, device, rounds)
    middle = {key: statistics.median(value) for key, value in times.items()}
    rate = matmul.rate(times["matmul"])
    floor = flops_of_step(model, rows, geometry, size.window) / rate
    tokens = source_tokens(rows)
    throughput = {
        "model": name, "examples": sum(len(row) for row in rows), "source tokens": tokens,
        "shapes": f"[{size.rows} x {size.positions}], [{len(batch['encoder_input_ids'])} x "
        f"{batch['encoder_input_ids'].shape[1]}]",
        "lclm ms": middle["ours"] * 1e3, "plain ms": middle["plain"] * 1e3,
        "speed-up": middle["plain"] / middle["ours"], "lclm tokens/s": tokens / middle["ours"],
        "plain tokens/s": tokens / middle["plain"], "floor ms": floor * 1e3,
        "lclm / floor": middle["ours"] / floor, "GFLOP/s": rate / 1e9,
        "quartiles": {key: spread(value) for key, value in times.items()},
    }  # fmt: skip
    named = ("encoder", "adapter", "decoder", "loss", "update")
    between = [
        (sum_ - sum(parts)) / whole
        for whole, sum_, *parts in zip(
            times["ours"], times["passes"], *(times[key] for key in named[:4]), strict=True
        )
    ]
    shares = {"model": name, "step ms": middle["ours"] * 1e3}
    shares |= {f"{key} %": 100 * middle[key] / middle["ours"] for key in named}
    shares["outside %"] = 100 * statistics.median(between)
    return throughput, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--name", default="train_step", help="name of the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    results = [measure(name, device, dtype, options.rounds) for name in options.sizes]
    notes = [
        "lclm: examples packed to fixed shapes, one encoder and one decoder call, logits only with loss.",
        "plain: one encoder call per memory (windows padded to W), one decoder call over examples "
        "padded to the longest, logits everywhere. Same weights and examples; losses and gradients of the "
        "two are checked equal first.",
        f"Medians of {options.rounds} rounds in which all take turns; {options.dtype}; one process.",
        "Floor: FLOPs of the real tokens, forward and backward, at the rate of a large matrix product, "
        "timed in turn too (GFLOP/s).",
    ]
    save(options.name, device, [throughput for throughput, _ in results], notes)
    notes = [
        "Encoder, adapter, decoder and loss are timed on their own, forward and backward, on the step's "
        "shapes and masks; update is clipping and AdamW. Shares are of the whole step.",
        "outside: what forward and backward of the whole model take beyond these four (median of the rounds' "
        "differences): embeddings, masks, pooling, splice. Aim: under 5%.",
    ]
    save(f"{options.name}_shares", device, [shares for _, shares in results], notes)


if __name__ == "__main__":
    main()
