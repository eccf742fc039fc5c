"""Schedules, parameter groups and Muon."""

from __future__ import annotations

import pytest
import torch

from lclm.train.optim import (
    build_optimizer,
    embedding_ids,
    group_settings,
    newton_schulz,
    parameter_groups,
    scheduled_rate,
)
from lclm.train.settings import ComponentSettings, MuonSettings, ScheduleSettings


def rates(schedule, base=1.0, steps=100):
    return [scheduled_rate(schedule, base, step, step / steps) for step in range(steps)]


def test_schedules():
    cosine = rates(ScheduleSettings("cosine", warmup_steps=10, min_lr=0.1))
    assert cosine[0] == pytest.approx(0.1, abs=0.01)
    assert max(cosine) == cosine[9] > cosine[50] > cosine[99] == pytest.approx(0.1, abs=0.01)
    linear = rates(ScheduleSettings("linear", decay_share=0.3))
    assert linear[:70] == [1.0] * 70
    assert linear[85] == pytest.approx(0.5)
    assert rates(ScheduleSettings("constant", warmup_steps=2))[:3] == [0.5, 1.0, 1.0]
    assert rates(ScheduleSettings("cosine", min_lr=5.0), base=1.0)[60] == 1.0


def test_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        ScheduleSettings("cosin")


def test_groups_are_by_component_and_kind():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 3), "table": torch.nn.Embedding(5, 3)})
    settings = ComponentSettings(lr=1.0, weight_decay=0.1, muon=MuonSettings(lr=2.0))
    components = {"decoder": list(model.named_parameters()), "encoder": []}
    groups = parameter_groups(components, {"decoder": settings}, embedding_ids(model))
    found = {group["name"]: (group["params"], group["lr"], group["weight_decay"]) for group in groups}
    assert found["decoder.muon"] == ([model["body"].weight], 2.0, 0.01)
    assert found["decoder"] == ([model["table"].weight], 1.0, 0.1)
    assert found["decoder.plain"] == ([model["body"].bias], 1.0, 0.0)


def test_muon_follows_torchs():
    """The same mathematics as torch.optim.Muon, which iterates in bf16."""
    torch.manual_seed(0)
    shapes = [(16, 16), (40, 16), (16, 40), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"params": ours, **group_settings("encoder", "muon", ComponentSettings(muon=MuonSettings()))}
    optimizer = build_optimizer([group])
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.01)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_newton_schulz_brings_singular_values_near_one():
    values = torch.linalg.svdvals(newton_schulz(torch.randn(3, 8, 20), 5))
    assert (values > 0.6).all() and (values < 1.3).all()


def test_muon_and_adamw_in_one():
    matrix, bias = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    settings = ComponentSettings(lr=1e-2, muon=MuonSettings())
    optimizer = build_optimizer([
        {"params": [matrix], **group_settings("decoder", "muon", settings)},
        {"params": [bias], **group_settings("decoder", "plain", settings)},
    ])  # fmt: skip
    twin = torch.nn.Parameter(bias.detach().clone())
    reference = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        matrix.grad, bias.grad = torch.randn(4, 4), torch.randn(4)
        twin.grad = bias.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(bias, twin)
