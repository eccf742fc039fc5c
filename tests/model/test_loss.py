"""The loss equals the plain computation, in pieces or whole, for decoders that scale their logits too."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from lclm.model.loss import next_token_loss
from lclm.model.spans import NO_LOSS


def plain(hidden, labels, head):
    logits = head(hidden[:, :-1]).float().flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=NO_LOSS, reduction="sum")


@pytest.mark.parametrize("max_logits", [1, 97 * 3, None])
def test_equals_plain_with_gradients(max_logits):
    torch.manual_seed(0)
    head = nn.Linear(16, 97)
    config = AutoConfig.for_model("qwen3", vocab_size=97)
    hidden = torch.randn(3, 11, 16, requires_grad=True)
    labels = torch.randint(0, 97, (3, 11)).masked_fill(torch.rand(3, 11) < 0.5, NO_LOSS)
    total, losses = next_token_loss(hidden, labels, head, config, max_logits)
    expected = plain(hidden, labels, head)
    assert torch.allclose(total, expected, atol=1e-5)
    assert torch.allclose(losses.sum(), expected.detach(), atol=1e-4)
    assert not losses.requires_grad
    got = torch.autograd.grad(total, [hidden, head.weight, head.bias])
    wanted = torch.autograd.grad(expected, [hidden, head.weight, head.bias])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(got, wanted, strict=True))


def test_token_losses_are_in_row_major_order_of_labels():
    torch.manual_seed(0)
    head, config = nn.Linear(8, 31), AutoConfig.for_model("qwen3", vocab_size=31)
    hidden, labels = torch.randn(2, 6, 8), torch.full((2, 6), NO_LOSS)
    places = [(0, 2), (0, 5), (1, 1)]
    for row, column in places:
        labels[row, column] = row + column
    _, losses = next_token_loss(hidden, labels, head, config)
    expected = [functional.cross_entropy(head(hidden[r, c - 1]), labels[r, c]) for r, c in places]
    assert torch.allclose(losses, torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere", "llama", "gpt_neox", "gpt2"])
def test_logits_equal_the_decoders_own(model_type, tiny, rng):
    own = {
        "gemma2": {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
        },
        "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
        "cohere": {"logit_scale": 0.3},
    }.get(model_type, {})
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        own = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 40,
            "max_position_embeddings": 128,
        }
    decoder = {
        "model_type": model_type,
        "vocab_size": 61,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        **sizes,
        **own,
    }
    model = tiny.model(decoder=decoder, attention="eager")
    rows = [[tiny.example([("text", 19)], rng)]]
    arrays = tiny.lay_out(rows, model)
    with torch.no_grad():
        own_logits = model.decoder(input_ids=arrays["input_ids"]).logits
        logits = model(input_ids=arrays["input_ids"], position_ids=arrays["position_ids"]).logits
        alone = model(**{k: arrays[k] for k in ("input_ids", "position_ids")}, labels=arrays["input_ids"])
    assert isinstance(model.decoder, type(AutoModelForCausalLM.from_config(model.config.decoder_config)))
    assert torch.allclose(logits, own_logits, atol=1e-5)
    expected = functional.cross_entropy(own_logits[0, :-1], arrays["input_ids"][0, 1:], reduction="none")
    assert torch.allclose(alone.token_losses, expected, atol=1e-5)
    packed = tiny.lay_out([[rows[0][0], rows[0][0]]], model)
    with torch.no_grad():
        twice = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits
    assert torch.allclose(twice[0, 19:], own_logits[0], atol=1e-5)
