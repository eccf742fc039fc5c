"""Saving, loading and full-precision weights of the engine, at every ZeRO stage and precision."""

from __future__ import annotations

import pytest
import torch

from lclm.train.settings import MuonSettings
from tests.train.toy import ALL, Toy, make, same, state_of, step


@pytest.mark.parametrize(("zero", "precision"), ALL)
def test_a_loaded_engine_goes_on_like_the_saved_one(tmp_path, zero, precision):
    engine, guard = make(zero, precision)
    for seed in range(2):
        step(engine, guard, seed)
    assert engine.save(tmp_path, {}) is None
    step(engine, guard, 2)
    expected = state_of(engine)
    engine.close()
    again, guard = make(zero, precision)
    again.load(tmp_path)
    step(again, guard, 2)
    assert same(expected, state_of(again))


def test_muon_is_saved_and_loaded(tmp_path):
    engine, guard = make(0, "fp32", muon=MuonSettings())
    step(engine, guard, 0)
    engine.save(tmp_path, {})
    step(engine, guard, 1)
    expected = state_of(engine)
    again, guard = make(0, "fp32", muon=MuonSettings())
    again.load(tmp_path)
    step(again, guard, 1)
    assert same(expected, state_of(again))


@pytest.mark.parametrize(("zero", "precision"), ALL)
def test_frozen_weights_are_not_saved_and_settings_are_set_again(tmp_path, zero, precision):
    engine, guard = make(zero, precision)
    step(engine, guard, 0)
    for group in engine.base.param_groups:
        group.update(lr=123.0, weight_decay=7.0)
    engine.save(tmp_path, {})
    for file in tmp_path.rglob("*model_states.pt"):
        assert not [name for name in torch.load(file, weights_only=False)["module"] if "frozen" in name]
    again, _ = make(zero, precision)
    again.load(tmp_path)
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in again.base.param_groups}
    assert settings == {"encoder": (1e-2, 0.1), "encoder.plain": (1e-2, 0.0), "decoder.plain": (3e-3, 0.0)}


@pytest.mark.parametrize(("zero", "precision"), ALL)
def test_masters_start_as_the_given_fp32_weights(zero, precision):
    engine, guard = make(zero, precision)
    torch.manual_seed(0)
    start = {name: value for name, value in Toy().named_parameters() if "frozen" not in name}
    learned = engine.learned_weights()
    assert learned.keys() == start.keys()
    assert all(torch.equal(learned[name], value) for name, value in start.items())
    step(engine, guard, 0)
    learned = engine.learned_weights()
    assert not any(torch.equal(learned[name], value) for name, value in start.items())


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    engine, guard = make(0, "fp32")
    step(engine, guard, 0)
    engine.save(tmp_path, {})
    other, _ = make(0, "fp32", thaw=True)
    with pytest.raises(ValueError, match=r"frozen\.bias"):
        other.load(tmp_path)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_an_offloaded_optimizer_takes_the_same_steps(tmp_path, precision):
    """Bit for bit, over micro-batches, a step that is left out, and a checkpoint loaded by the other."""
    found = []
    for offload in (False, True):
        engine, guard = make(3, precision, accumulation=2, offload_optimizer=offload)
        folder = tmp_path / str(offload)
        skipped = [step(engine, guard, seed, (1,) if seed == 1 else (), accumulation=2) for seed in range(3)]
        assert engine.save(folder, {}) is None
        engine.close()
        engine, guard = make(3, precision, accumulation=2, offload_optimizer=not offload)
        engine.load(folder)
        skipped.append(step(engine, guard, 3, accumulation=2))
        found.append((skipped, state_of(engine)))
        engine.close()
    assert found[0][0] == [False, True, False, False]
    assert same(*found)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_offloading_is_refused_where_it_would_do_nothing_or_harm(zero):
    with pytest.raises(ValueError, match="ZeRO 3"):
        make(zero, "bf16", offload_optimizer=True)
