"""Poisoned losses and gradients: skipped together, weights and moments bitwise unchanged, at every stage."""

import copy

import pytest
import torch

from lclm.train.engine import Engine, start_processes
from lclm.train.guard import Guard
from lclm.train.optim import parameter_groups
from lclm.train.settings import ComponentSettings, EngineSettings, MuonSettings


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(8, 16)
        self.decoder = torch.nn.Linear(16, 4)
        self.frozen = torch.nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.poison = None

    def forward(self, x, y):
        hidden = self.encoder(x)
        if self.poison is not None:
            hidden.register_hook(lambda grad: grad * self.poison)
        return (self.frozen(self.decoder(hidden.tanh())).float() - y).square().mean()


def components(model):
    return {name: list(getattr(model, name).named_parameters()) for name in ("encoder", "decoder")}


def make(zero, precision, *, accumulation=1, muon=None, clip=1.0):
    torch.manual_seed(0)
    model = Toy()
    settings = EngineSettings(zero=zero, precision=precision)
    processes = start_processes(settings)
    learn = {
        "encoder": ComponentSettings(lr=1e-2, weight_decay=0.1, muon=muon),
        "decoder": ComponentSettings(lr=3e-3),
    }
    groups = parameter_groups(components(model), learn)
    engine = Engine(model, groups, settings, processes, zero=zero, clip=clip, micro_batch=2, accumulation=accumulation)
    return engine, Guard(engine, clip, 3)


def state_of(engine):
    weights = engine.learned_weights()
    moments = copy.deepcopy([
        {k: v for k, v in state.items()} for state in engine.base.state.values()
    ])
    low = [p.detach().clone() for p in engine.model.parameters() if getattr(p, "ds_tensor", None) is None]
    return weights, moments, low


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def step(engine, guard, seed, poison_loss=(), poison_gradient=None, accumulation=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if engine.bf16 else torch.float32
    guard.start_step(watch_norms=True)
    for index in range(accumulation):
        x, y = torch.randn(2, 8, generator=generator).to(dtype), torch.randn(2, 4, generator=generator)
        engine.model.poison = poison_gradient
        loss = engine.deepspeed(x, y)
        engine.deepspeed.backward(guard.loss(loss, index not in poison_loss))
        if index + 1 == accumulation:
            guard.before_step()
        engine.deepspeed.step()
    return guard.after_step(["some-key"], "gradient")


ALL = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16")]


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
