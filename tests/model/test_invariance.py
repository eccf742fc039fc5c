"""Packing and padding change nothing: an example alone, padded, and packed among others reads the same."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model import per_segment

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
IMPLEMENTATIONS = ("sdpa", "eager", per_segment.NAME)


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


def check_property(choice, implementations, examples, tiny):
    models = [tiny.model(attention=implementation, **choice) for implementation in implementations]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(examples=tiny.examples(ratios=[None, *choice.get("ratios", [])]), cut=st.integers(0, 5))
    def run(examples, cut):
        for model in models:
            check(model, examples, tiny, cut)

    run()


@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_packed_and_padded_equal_alone(choice, tiny):
    check_property(choice, IMPLEMENTATIONS, 4, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_packed_and_padded_equal_alone_at_length(choice, tiny):
    check_property(choice, IMPLEMENTATIONS, 20, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("encoder", ["qwen3", "bert"])
def test_flex_attention_equals_sdpa(encoder, attention, tiny, rng):
    """Forward only: flex_attention has no backward on a CPU."""
    example = [("text", 5), ("memory", 37), ("text", 4), ("memory", 5), ("text", 2)]
    rows = [[tiny.example(example, rng), tiny.example(example, rng)], [tiny.example(example, rng)]]
    one, other = (
        example_logits(tiny.model(encoder=encoder, encoder_attention=attention, attention=name), rows, tiny)
        for name in ("sdpa", "flex_attention")
    )
    assert all((a - b).abs().max() <= TOLERANCE for a, b in zip(one, other, strict=True))


SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sliding_window_layers_read_as_alone_and_as_by_themselves(implementation, tiny, rng):
    """Hybrid layers on both sides: masks per kind of layer, as transformers makes them for one sequence."""
    model = tiny.model(decoder={**tiny.decoder, **SLIDING}, attention=implementation)
    check(model, [tiny.example([("text", 9), ("memory", 30), ("text", 12)], rng) for _ in range(3)], tiny, 1)
    arrays = tiny.lay_out([[tiny.example([("text", 30)], rng)]], model)
    with torch.no_grad():
        own = model.decoder(input_ids=arrays["input_ids"]).logits
        logits = model(input_ids=arrays["input_ids"], position_ids=arrays["position_ids"]).logits
    assert (own - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("encoder", "own"),
    [
        (
            {
                "model_type": "modernbert",
                "global_attn_every_n_layers": 2,
                "local_attention": 8,
                "intermediate_size": 32,
            },
            {},
        ),
        (
            {"model_type": "roberta", "intermediate_size": 40, "type_vocab_size": 1},
            {"bos_token_id": 0, "eos_token_id": 2},
        ),
        ({"model_type": "bert", "intermediate_size": 40}, {}),
        ({"model_type": "qwen3", "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8}, {}),
        (
            {
                "model_type": "gemma3_text",
                "intermediate_size": 40,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            {},
        ),
    ],
    ids=lambda value: value.get("model_type", ""),
)
@pytest.mark.parametrize("attention", ["sdpa", per_segment.NAME])
def test_a_window_reads_as_the_encoder_reads_it_by_itself(attention, encoder, own, tiny, rng):
    """Pooled states of one window among others equal a plain call of the encoder on that window's tokens."""
    config = {
        "vocab_size": 53,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 1,
        "max_position_embeddings": 80,
        "initializer_range": 0.15,
        **encoder,
        **own,
    }
    causal = encoder["model_type"] in ("qwen3", "gemma3_text")
    tiny.encoders["trial"] = config
    directions = "causal" if causal else "bidirectional"
    model = tiny.model(encoder="trial", encoder_attention=directions, window=24, attention=attention)
    examples = [tiny.example([("memory", length), ("text", 2)], rng) for length in (21, 5, 30)]
    check(model, examples, tiny, 2)
    arrays = tiny.lay_out([examples], model)
    memories = model.encode_memories(**arrays)
    with torch.no_grad():
        ids = torch.from_numpy(examples[0].spans[0].ids)[None].long()
        states = model.encoder(input_ids=ids).last_hidden_state[0]
        pooled = torch.stack([block.mean(0) for block in states.split(4)])
        expected = model.adapter(pooled, torch.tensor([len(pooled)]))
    assert (memories[0] - expected).abs().max() <= TOLERANCE


def test_attention_implementations_agree(tiny, rng):
    example = tiny.example([("text", 5), ("memory", 37), ("text", 4), ("memory", 5), ("text", 2)], rng)
    for attention, encoder in itertools.product(("causal", "bidirectional"), ("qwen3", "bert")):
        one, *others = (
            example_logits(
                tiny.model(encoder=encoder, encoder_attention=attention, attention=name), [[example]], tiny
            )
            for name in IMPLEMENTATIONS
        )
        assert all((one[0] - other[0]).abs().max() <= TOLERANCE for other in others)
