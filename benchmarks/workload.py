"""What the benchmarks run: models of two sizes, batches like a recipe's, and the plain implementation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lclm.model import LCLMConfig, LCLMForConditionalGeneration
from lclm.model.spans import Example, Geometry, Span, lay_out
from lclm.model.windows import rows_needed

SPECIAL = {"memory_start_id": 0, "memory_id": 1, "memory_end_id": 2, "pad_id": 3}


@dataclass(frozen=True)
class Size:
    """A model and the shape of its batches."""

    name: str
    layers: dict[str, Any]
    ratios: tuple[int, ...]
    window: int
    rows: int  # B
    positions: int  # D
    encoder_rows: int  # E of one row of the batch
    min_span: int
    max_span: int
    settings: dict[str, Any] = field(default_factory=dict)  # of LCLMConfig
    decoder: dict[str, Any] | None = None  # the decoder's layers where they differ


def _qwen3(width: int, layers: int, heads: int, inner: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
        "intermediate_size": inner, "vocab_size": vocabulary, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip


SIZES = {
    "tiny": Size(
        "tiny",
        _qwen3(128, 2, 4, 320, 320),
        (4, 8),
        64,
        2,
        512,
        8,
        32,
        128,
        {
            "position_in_block": True,
            "adapter_init": "identity",
            "tie_word_embeddings": True,
        },
    ),
    "small": Size("small", _qwen3(256, 4, 4, 704, 4096), (8, 16), 256, 1, 1024, 4, 64, 1024),
    "large": Size("large", _qwen3(1024, 12, 16, 2816, 32768), (8, 16), 1024, 2, 8192, 16, 64, 4096),
}


def make_model(size: Size, device: torch.device, dtype: torch.dtype) -> LCLMForConditionalGeneration:
    """A model with random weights, in training mode."""
    torch.manual_seed(0)
    config = LCLMConfig(
        encoder_config=dict(size.layers), decoder_config=dict(size.layers), ratio=size.ratios[0],
        ratios=list(size.ratios), window=size.window, encoder_pad_id=3, encoder_marker_id=3, **SPECIAL,
        **size.settings,
    )  # fmt: skip
    return LCLMForConditionalGeneration(config).to(device, dtype).train()


def make_rows(size: Size, geometry: Geometry, rng: np.random.Generator) -> list[list[Example]]:
    """B rows of examples (a memory, a text with loss; sometimes two of each), filled to the budgets."""
    vocabulary = size.layers["vocab_size"]

    def ids(low: int, high: int) -> np.ndarray:
        count = int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
        return rng.integers(len(SPECIAL), vocabulary, count)

    rows = []
    for _ in range(size.rows):
        row: list[Example] = []
        positions, windows, failures = 0, [], 0
        while failures < 50:
            spans = []
            for _ in range(int(rng.integers(1, 3))):
                ratio = int(rng.choice(size.ratios))
                spans.append(Span("memory", ids(size.min_span, size.max_span), ratio=ratio))
                spans.append(Span("text", ids(size.min_span, size.max_span), loss=True))
            example = Example(tuple(spans))
            cost = geometry.size(example)
            fits = rows_needed([*windows, *cost.windows], geometry.row_length) <= size.encoder_rows
            if positions + cost.positions > size.positions or not fits:
                failures += 1
                continue
            row.append(example)
            positions += cost.positions
            windows += cost.windows
        rows.append(row)
    return rows


def packed(
    rows: list[list[Example]], size: Size, geometry: Geometry, device: torch.device
) -> dict[str, torch.Tensor]:
    """The batch as lclm trains it: fixed shapes [B, D] and [E, R]."""
    latents = size.rows * size.encoder_rows * -(-size.window // min(size.ratios))
    arrays = lay_out(
        rows, geometry, positions=size.positions, encoder_rows=size.rows * size.encoder_rows, latents=latents
    )
    arrays.pop("attention_mask")
    batch: dict[str, Any] = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    batch["num_latents"] = latents
    return batch


class Plain:
    """The same mathematics without packing: every memory on its own, windows and examples padded, all logits.

    What one writes first: per memory one encoder call over its windows padded to W, block means by reshaping,
    the adapter; per example its embeddings put together; then one decoder call over the examples padded to
    the longest, cross-entropy over the logits of all positions.
    """

    def __init__(self, model: LCLMForConditionalGeneration, rows: list[list[Example]], size: Size) -> None:
        self.model, self.size, self.device = model, size, model.device
        self.examples = [
            [
                (span.kind, torch.from_numpy(span.ids).long().to(self.device), span.loss, span.ratio)
                for span in e.spans
            ]
            for row in rows
            for e in row
        ]
        self.memories = [span for e in self.examples for span in e if span[0] == "memory"]

    def encode(self, ids: torch.Tensor, ratio: int) -> torch.Tensor:
        """Latents [M, K] of one memory."""
        window = self.size.window
        count = -(-len(ids) // window)
        padded = functional.pad(ids, (0, count * window - len(ids)), value=SPECIAL["pad_id"]).view(
            count, window
        )
        real = (torch.arange(count * window, device=self.device) < len(ids)).view(count, window)
        embeddings = self.model.encoder.get_input_embeddings()(padded)
        if self.model.block_position is not None:
            places = torch.arange(window, device=self.device) % ratio
            embeddings = embeddings + functional.embedding(places, self.model.block_position.weight)
        hidden = self.model.encoder(
            inputs_embeds=embeddings, attention_mask=real.long(), use_cache=False
        ).last_hidden_state
        blocks = (hidden * real.unsqueeze(-1)).view(-1, ratio, hidden.shape[-1]).float().sum(1)
        pooled = blocks / real.view(-1, ratio).sum(1, keepdim=True).clamp(min=1)
        return self.model.adapter(pooled[: -(-len(ids) // ratio)].to(hidden.dtype), None)

    def encode_all(self) -> torch.Tensor:
        """Latents of all memories, one after another."""
        return torch.cat([self.encode(ids, ratio) for _, ids, _, ratio in self.memories])

    def loss(self) -> torch.Tensor:
        """Mean cross-entropy over the loss-bearing tokens."""
        embed, brackets = self.model.decoder.get_input_embeddings(), self.model.brackets.weight
        inputs, labels = [], []
        for example in self.examples:
            parts, targets = [], []
            for kind, ids, loss, ratio in example:
                if kind == "memory":
                    part = torch.cat([brackets[:1], self.encode(ids, ratio), brackets[1:]])
                else:
                    part = embed(ids)
                parts.append(part)
                targets.append(ids if loss else torch.full((len(part),), -100, device=self.device))
            inputs.append(torch.cat(parts))
            labels.append(torch.cat(targets))
        pad = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(part) for part in inputs], device=self.device)
        embeddings, target = pad(inputs, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
        mask = (torch.arange(embeddings.shape[1], device=self.device) < lengths[:, None]).long()
        logits = self.model.decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), target[:, 1:].flatten())


def source_tokens(rows: list[list[Example]]) -> int:
    """Tokens before compression."""
    return sum(len(span.ids) for row in rows for example in row for span in example.spans)


def check_equal(model: LCLMForConditionalGeneration, plain: Plain, batch: dict[str, Any]) -> float:
    """Largest difference of the two implementations' gradients, relative to the largest; must be small."""
    losses, gradients = [], []
    for call in (lambda: model(**batch).loss, plain.loss):
        model.zero_grad(set_to_none=True)
        loss = call()
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    ours, theirs = gradients
    assert ours.keys() == theirs.keys(), "the implementations reach different parameters"
    worst = max(
        float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1e-12)) for n in ours
    )
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    assert abs(losses[0] - losses[1]) < tolerance * abs(losses[1]), f"losses differ: {losses}"
    assert worst < tolerance, f"gradients differ by {worst:.2g} of the largest"
    return worst
