"""Loss and gradients: equal however examples are packed, and present where something learns."""

import itertools

import pytest

from lclm.model.build import COMPONENTS, components

STRUCTURES = [
    [("text", 3), ("memory", 21), ("loss", 6)],
    [("loss", 5), ("memory", 4), ("loss", 3), ("memory", 9), ("loss", 2)],
    [("memory", 33), ("loss", 4)],
    [("loss", 7)],
]
CHOICES = [
    {},
    {"encoder": "bert", "encoder_attention": "bidirectional"},
    {"adapter": "mlp_attn", "pooling": "eos"},
    {"adapter": "attn_mlp", "pooling": "concat", "overlap": 4},
    {"position_in_block": True, "ratios": [4, 8], "max_rows_per_forward": 2},
]


def name(choice):
    return "-".join(str(value) for value in choice.values()) or "plain"


def loss_and_gradients(model, rows, tiny, count, **budgets):
    arrays = tiny.lay_out(rows, model, **budgets)
    arrays.pop("attention_mask")
    model.zero_grad()
    output = model(**arrays, num_items_in_batch=count)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def loss_tokens(rows):
    return sum(
        int(len(s.ids) - (i == 0)) for row in rows for e in row for i, s in enumerate(e.spans) if s.loss
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_packing_padding_training_and_checkpointing_change_no_gradient(choice, attention, tiny, rng):
    model = tiny.model(attention=attention, **choice)
    examples = [tiny.example(structure, rng) for structure in STRUCTURES]
    count = loss_tokens([examples])
    losses, gradients = 0.0, {}
    for example in examples:
        output, found = loss_and_gradients(model, [[example]], tiny, count)
        losses += output.loss.item()
        gradients = {n: gradients.get(n, 0) + found.get(n, 0) for n in {**gradients, **found}}
    room = {"positions": 120, "encoder_rows": 12, "latents": 60}
    cases = itertools.product(([examples], [examples[:3], examples[3:]]), (False, True), (False, True))
    for rows, train, checkpointing in cases:
        model.train(train)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        output, found = loss_and_gradients(model, rows, tiny, count, **room)
        assert output.loss.item() == pytest.approx(losses, abs=1e-5)
        assert found.keys() == gradients.keys()
        for parameter, gradient in found.items():
            assert (gradient - gradients[parameter]).abs().max() < 2e-5, parameter


def test_every_component_gets_gradients_and_other_memory_another_loss(tiny, rng):
    for choice in CHOICES:
        model = tiny.model(**choice).train()
        example = tiny.example(STRUCTURES[0], rng)
        output, _ = loss_and_gradients(model, [[example]], tiny, None)
        for component in COMPONENTS:
            norm = sum(p.grad.norm() for _, p in components(model)[component] if p.grad is not None)
            assert norm > 0, (name(choice), component)
        spans = list(example.spans)
        spans[1] = tiny.example([("memory", 21)], rng).spans[0]
        other, _ = loss_and_gradients(model, [[type(example)(tuple(spans))]], tiny, None)
        assert abs(other.loss.item() - output.loss.item()) > 1e-4


def test_frozen_components_get_no_gradient(tiny, rng):
    model = tiny.model()
    for component in ("encoder", "decoder"):
        for _, parameter in components(model)[component]:
            parameter.requires_grad_(False)
    _, gradients = loss_and_gradients(model, [[tiny.example(STRUCTURES[0], rng)]], tiny, None)
    assert {n.split(".")[0] for n in gradients} == {"adapter", "brackets"}


def test_empty_pack_reaches_every_parameter_with_zero(tiny):
    model = tiny.model(position_in_block=True)
    output, gradients = loss_and_gradients(model, [[]], tiny, 1, positions=32, encoder_rows=2, latents=8)
    assert output.loss.item() == 0
    assert output.token_losses.shape == (0,)
    for component in COMPONENTS:
        names = [n for n, _ in components(model)[component]]
        assert any(n in gradients for n in names), component
    assert all(not gradient.any() for gradient in gradients.values())


def test_several_ratios_in_one_batch(tiny, rng):
    model = tiny.model(ratios=[2, 4, 8])
    rows = [[tiny.example([("text", 2), ("memory", 19, ratio), ("loss", 4)], rng) for ratio in (2, 4, 8)]]
    arrays = tiny.lay_out(rows, model)
    assert arrays["memory_sizes"].tolist() == [10, 5, 3]
    assert [len(latents) for latents in model.encode_memories(**arrays)] == [10, 5, 3]


def test_components_hold_every_parameter_once_and_tied_ones_in_the_decoder(tiny):
    model = tiny.model(encoder="tied", position_in_block=True, tie_word_embeddings=True)
    assert model.encoder.get_input_embeddings().weight is model.decoder.get_input_embeddings().weight
    parts = components(model)
    found = [id(p) for part in parts.values() for _, p in part]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert "block_position.weight" in dict(parts["encoder"])
    assert id(model.decoder.get_input_embeddings().weight) in [id(p) for _, p in parts["decoder"]]
