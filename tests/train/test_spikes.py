"""What counts as a jump of the loss: by task, by tokens, against the steps before."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from lclm.recipe import load_recipe
from lclm.train.feed import _example_losses
from lclm.train.settings import SpikeSettings
from lclm.train.spikes import Spikes, expected


def watching(steps: int = 20, **settings) -> Spikes:
    """Two tasks: one around 3 nats with many tokens, one around 1 with few, both wavering by 0.01."""
    spikes = Spikes(SpikeSettings(**({"window_steps": 16, "sigmas": 6.0, "factor": 1.1} | settings)))
    for number in range(steps):
        waver = 0.01 if number % 2 else -0.01
        spikes.add({"text": (1000 * (3 + waver), 1000.0), "chat": (10 * (1 + waver), 10.0)})
    return spikes


def test_a_task_is_measured_against_itself():
    spikes = watching()
    assert spikes.find({"text": (3020.0, 1000.0), "chat": (10.0, 10.0)}) is None
    found = spikes.find({"text": (3000.0, 1000.0), "chat": (20.0, 10.0)})
    assert found is not None and found["task"] == "chat" and found["loss"] == 2.0
    assert found["expected"] == pytest.approx(1.0)
    assert spikes.find({"text": (1000.0, 1000.0), "chat": (10.0, 10.0)}) is None
    assert spikes.find({"new": (1e9, 10.0)}) is None and spikes.find({"text": (0.0, 0.0)}) is None


def test_few_tokens_may_stray_further():
    mean, spread = expected(watching().seen["text"], 1000.0)
    assert mean == pytest.approx(3.0) and spread == pytest.approx(0.01, rel=0.05)
    assert expected(watching().seen["text"], 10.0)[1] == pytest.approx(10 * spread)
    spikes = watching(factor=1.0)
    assert spikes.find({"text": (3200.0, 1000.0)}) is not None
    assert spikes.find({"text": (32.0, 10.0)}) is None


def test_both_bounds_must_be_passed():
    assert watching(factor=1.1).find({"text": (3250.0, 1000.0)}) is None
    assert watching(factor=1.05).find({"text": (3250.0, 1000.0)}) is not None
    assert watching(factor=1.05, sigmas=1000.0).find({"text": (3250.0, 1000.0)}) is None


def test_nothing_is_judged_before_half_the_window_and_nothing_older_is_kept():
    assert watching(steps=7).find({"text": (1e6, 1000.0)}) is None
    assert watching(steps=8).find({"text": (1e6, 1000.0)}) is not None
    spikes = watching(steps=100)
    assert len(spikes.seen["text"]) == 16
    again = Spikes(spikes.settings)
    again.seen = json.loads(json.dumps(spikes.seen))
    losses = {"text": (4000.0, 1000.0), "chat": (17.0, 10.0)}
    assert again.find(losses) == spikes.find(losses)


def test_off_is_off():
    spikes = Spikes(None)
    spikes.add({"text": (1.0, 1.0)})
    assert spikes.seen == {} and spikes.find({"text": (1e9, 1.0)}) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("action=back", "use skip or rewind"),
        ("max_rewinds=2", "no effect with action skip"),
        ("factor=0.5", "factor at least 1"),
        ("window_steps=2", "window_steps at least 4"),
    ],
)
def test_settings_that_cannot_work(wrong, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("recipes/tiny.yaml", [f"train.spike.{wrong}"])


def test_the_sample_with_the_highest_loss_is_named():
    """Two rows: [a: 4 tokens, b: 3 tokens, padding], [c: 5 tokens, padding]; tasks 0, 1, 0."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
    labels = torch.full((2, 8), -100)
    labels[0, [1, 3]] = 5
    labels[0, [5, 6]] = 6
    labels[1, [2, 4]] = 7
    batch = SimpleNamespace(
        arrays={"labels": labels, "position_ids": positions},
        keys=[["a", "b"], ["c"]],
        task_ids=torch.tensor([0, 0, 1, 1, 0, 0]),
    )
    losses = torch.tensor([1.0, 2.0, 9.0, 8.0, 3.0, 5.0])
    assert _example_losses(batch, losses, 0) == [(1.5, "a"), (4.0, "c")]
    assert _example_losses(batch, losses, 1) == [(8.5, "b")]
    assert _example_losses(batch, losses, None) == [(1.5, "a"), (8.5, "b"), (4.0, "c")]
    assert _example_losses(batch, None, 0) == [(0.0, "a"), (0.0, "b"), (0.0, "c")]
