"""A small model on an engine, one step of it, and bitwise comparison."""

from __future__ import annotations

import copy

import torch

from lclm.train.engine import Engine
from lclm.train.guard import Guard
from lclm.train.optim import parameter_groups
from lclm.train.processes import start_processes
from lclm.train.settings import ComponentSettings, EngineSettings

ALL = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16")]


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


def make(zero, precision, *, accumulation=1, muon=None, clip=1.0, thaw=False, **engine):
    torch.manual_seed(0)
    model = Toy()
    settings = EngineSettings(zero=zero, precision=precision, **engine)
    processes = start_processes(settings)
    learn = {
        "encoder": ComponentSettings(lr=1e-2, weight_decay=0.1, muon=muon),
        "decoder": ComponentSettings(lr=3e-3),
    }
    model.frozen.requires_grad_(thaw)
    groups = parameter_groups(components(model), learn)
    built = Engine(
        model, groups, settings, processes, zero=zero, clip=clip, micro_batch=2, accumulation=accumulation
    )
    return built, Guard(built, clip, 3)


def state_of(engine):
    weights = engine.learned_weights()
    moments = copy.deepcopy([dict(state.items()) for state in engine.base.state.values()])
    low = [p.detach().clone() for p in engine.model.parameters() if getattr(p, "ds_tensor", None) is None]
    return weights, moments, low


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=False))
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
    return guard.after_step([(0.0, "some-key")], "non-finite gradient")
