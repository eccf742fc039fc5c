"""Packing and padding change nothing: an example alone, padded, and packed among others reads the same."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-5
CHOICES = [
    *[
        {"pooling": p, "encoder_attention": a, "encoder": e}
        for p, a, e in itertools.product(
            ("mean", "concat", "eos"), ("causal", "bidirectional"), ("qwen3", "bert")
        )
    ],
    *[
        {"adapter": adapter, "encoder_attention": a}
        for adapter, a in itertools.product(("attn_mlp", "mlp_attn"), ("causal", "bidirectional"))
    ],
    {"overlap": 4},
    {"overlap": 4, "encoder_attention": "bidirectional"},
    {"overlap": 5, "pooling": "eos"},
    {"overlap": 4, "pooling": "concat", "encoder_attention": "bidirectional", "encoder": "bert"},
    {"ratios": [2, 4, 8], "position_in_block": True},
    {"ratios": [2, 4, 8], "adapter": "mlp_attn", "adapter_layers": 2},
    {"max_rows_per_forward": 1, "adapter": "attn_mlp"},
]
IMPLEMENTATIONS = ("sdpa", "eager")
PROPERTY = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def name(choice):
    return "-".join(str(value) for value in choice.values())


def example_logits(model, rows, tiny, **budgets):
    """Logits of each example of `rows`, in order."""
    arrays = tiny.lay_out(rows, model, **budgets)
    labels = arrays.pop("labels")
    mask = arrays["attention_mask"] if budgets.get("padding_side") else arrays.pop("attention_mask")
    with torch.no_grad():
        logits = model(**arrays).logits
    assert torch.isfinite(logits).all()
    found, geometry = [], model.config.geometry()
    for row, examples in enumerate(rows):
        start = int(labels.shape[1] - mask[row].sum()) if budgets.get("padding_side") == "left" else 0
        for example in examples:
            stop = start + geometry.size(example).positions
            found.append(logits[row, start:stop])
            start = stop
    return found


def check(model, examples, tiny, cut):
    """Alone = padded on either side = packed in one and in two rows, with room to spare."""
    alone = [example_logits(model, [[example]], tiny)[0] for example in examples]
    ratios = {"latents": 400, "encoder_rows": 40}
    rows = [examples[:cut], examples[cut:]]
    ways = {
        "right": example_logits(model, [[e] for e in examples], tiny, padding_side="right"),
        "left": example_logits(model, [[e] for e in examples], tiny, padding_side="left"),
        "packed": example_logits(model, [examples], tiny, positions=500, **ratios),
        "two rows": example_logits(model, rows, tiny, positions=500, **ratios),
    }
    for way, logits in ways.items():
        for number, (one, other) in enumerate(zip(alone, logits, strict=True)):
            assert (one - other).abs().max() <= TOLERANCE, (way, number)


@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_packed_and_padded_equal_alone(choice, tiny):
    models = [tiny.model(attention=implementation, **choice) for implementation in IMPLEMENTATIONS]

    @PROPERTY
    @given(examples=tiny.examples(ratios=[None, *choice.get("ratios", [])]), cut=st.integers(0, 5))
    def run(examples, cut):
        for model in models:
            check(model, examples, tiny, cut)

    run()


def test_attention_implementations_agree(tiny, rng):
    example = tiny.example([("text", 5), ("memory", 37), ("text", 4), ("memory", 5), ("text", 2)], rng)
    for attention, encoder in itertools.product(("causal", "bidirectional"), ("qwen3", "bert")):
        one, other = (
            example_logits(
                tiny.model(encoder=encoder, encoder_attention=attention, attention=name), [[example]], tiny
            )
            for name in IMPLEMENTATIONS
        )
        assert (one[0] - other[0]).abs().max() <= TOLERANCE
