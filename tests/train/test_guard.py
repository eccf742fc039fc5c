"""Poisoned losses and gradients: skipped together, weights and moments bitwise unchanged, at every stage."""

from __future__ import annotations

import pytest
import torch

from lclm.train.settings import MuonSettings
from tests.train.toy import ALL, Toy, make, same, state_of, step


@pytest.mark.parametrize(("zero", "precision"), ALL)
def test_poison_changes_nothing(zero, precision):
    engine, guard = make(zero, precision, accumulation=2)
    for seed in range(3):
        assert not step(engine, guard, seed, accumulation=2)
    before = state_of(engine)
    assert step(engine, guard, 7, poison_loss=[0], accumulation=2)
    assert step(engine, guard, 8, poison_gradient=float("inf"), accumulation=2)
    assert same(before, state_of(engine))
    assert guard.skipped == 2
    step(engine, guard, 9, accumulation=2)
    assert not same(before[0], state_of(engine)[0])
    after = state_of(engine)
    engine.close()
    clean, guard = make(zero, precision, accumulation=2)
    for seed in (0, 1, 2, 9):
        step(clean, guard, seed, accumulation=2)
    assert same(after, state_of(clean))


def test_poison_with_muon():
    engine, guard = make(0, "fp32", muon=MuonSettings())
    step(engine, guard, 0)
    before = state_of(engine)
    assert step(engine, guard, 1, poison_loss=[0])
    assert step(engine, guard, 1, poison_gradient=float("nan"))
    assert same(before, state_of(engine))


def test_too_many_in_a_row_names_the_samples():
    engine, guard = make(0, "fp32")
    assert step(engine, guard, 0, poison_loss=[0])
    assert step(engine, guard, 0, poison_loss=[0])
    assert not step(engine, guard, 0)
    assert step(engine, guard, 0, poison_loss=[0])
    assert step(engine, guard, 0, poison_loss=[0])
    with pytest.raises(ValueError, match="some-key"):
        step(engine, guard, 0, poison_loss=[0])


@pytest.mark.parametrize(("zero", "precision"), ALL)
def test_norms_per_component(zero, precision):
    engine, guard = make(zero, precision, clip=1e-3)
    step(engine, guard, 0)
    norms = guard.gradient_norms()
    reference = Toy()
    torch.manual_seed(0)
    reference = Toy()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, generator=generator), torch.randn(2, 4, generator=generator)
    reference(x, y).backward()
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    for name in ("encoder", "decoder"):
        parts = [p.grad.norm() for p in getattr(reference, name).parameters()]
        assert norms[name] == pytest.approx(torch.stack(parts).norm().item(), rel=tolerance)
    assert norms["all"] == pytest.approx((norms["encoder"] ** 2 + norms["decoder"] ** 2) ** 0.5, rel=1e-3)


def test_muon_is_refused_where_matrices_are_cut():
    with pytest.raises(ValueError, match="zero=0"):
        make(1, "fp32", muon=MuonSettings())
