"""Fingerprints: of the values, part by part; not of precision, order, layout or how they are held."""

from pathlib import Path

import pytest
import torch

from lclm.model import LCLMForConditionalGeneration
from lclm.model.fingerprint import COMPONENTS, Fingerprint, StoredWeights, fingerprints

FIXTURE = Path(__file__).parents[1] / "conformance" / "fixtures" / "mean-4x"


def test_equal_for_every_way_to_hold_the_same_weights(tiny, tmp_path):
    model = tiny.model(encoder="tied", tie_word_embeddings=True, position_in_block=True, ratios=[2, 4])
    expected = fingerprints(model)
    assert set(expected) == set(COMPONENTS) and len(set(expected.values())) == len(COMPONENTS)
    weights = dict(model.state_dict())
    assert fingerprints(model.to(torch.bfloat16)) == expected
    assert fingerprints(model, weights) == expected
    for tied in ("encoder.embed_tokens.weight", "decoder.lm_head.weight"):
        del weights[tied]
        assert fingerprints(model, weights) == expected
    fed = Fingerprint()
    for name in sorted(weights, reverse=True):
        fed.add(name, weights[name])
    assert fed.digests() == expected
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stored = StoredWeights(str(tmp_path), set(model.state_dict()))
    assert fingerprints(model, stored) == expected == model.config.fingerprints
    released = LCLMForConditionalGeneration.from_pretrained(FIXTURE)
    stored = StoredWeights(str(FIXTURE), set(released.state_dict()))
    brackets = {"brackets.weight": released.brackets.weight}
    assert fingerprints(released, {**stored, **brackets}) == fingerprints(released)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("encoder.layers.1.mlp.up_proj.weight", "encoder"),
        ("block_position.weight", "encoder"),
        ("adapter.fc1.bias", "adapter"),
        ("decoder.model.layers.0.self_attn.q_proj.weight", "decoder"),
        ("brackets.weight", "brackets"),
    ],
)
def test_a_changed_value_changes_its_component_only(name, component, tiny):
    model = tiny.model(position_in_block=True, ratios=[2, 4])
    before = model.fingerprints()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1
    after = model.fingerprints()
    assert {part for part in COMPONENTS if before[part] != after[part]} == {component}


def test_what_it_refuses(tiny):
    model, found = tiny.model(), Fingerprint()
    found.add("adapter.x", torch.ones(2))
    for name, tensor, message in (
        ("adapter.x", torch.ones(2), "twice"),
        ("lm_head.weight", torch.ones(2), "no weight of an LCLM"),
        ("adapter.y", torch.ones(2, device="meta"), "meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            found.add(name, tensor)
    weights = dict(model.state_dict())
    del weights["adapter.fc2.bias"]
    with pytest.raises(ValueError, match=r"lack 'adapter.fc2.bias'"):
        fingerprints(model, weights)
