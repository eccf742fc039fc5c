"""Killed and started again, a run ends as if nothing had happened; a run twice is the same run."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch

from lclm.checkpoint import RunFolder
from lclm.recipe import load_recipe
from lclm.train import runs
from lclm.train.trainer import train
from tests.end_to_end import small_run as small

STAGES = {
    "scratch": small.stage(14),
    "adapter": small.stage(6, learn=("adapter", "brackets")),
}


def kill_at(path, run, step, processes=1):
    """Start a recipe and kill it, without warning, once it has written the line of `step`."""
    process = small.start(path, processes)
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len([x for x in small.lines(run) if x["step"] >= step]):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0][-4000:]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def same_run(first, second):
    assert small.losses(first) == small.losses(second)
    before, after = small.weights(first / "export"), small.weights(second / "export")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = folder / "run"
    content = small.recipe(data, run, **STAGES)
    content["train"]["save_every_steps"] = None
    small.run(small.write(folder, content))
    return run


def test_killed_at_random_steps(data, tmp_path, whole):
    run = tmp_path / "run"
    content = small.recipe(data, run, **STAGES)
    content["train"]["save_every_steps"] = 3
    path = small.write(tmp_path, content)
    for step in (random.randrange(1, 13), random.randrange(15, 20)):
        kill_at(path, run, step)
    small.run(path)
    assert [line["step"] for line in small.lines(run)] == list(range(1, 21))
    same_run(whole, run)


def test_the_same_recipe_twice_gives_the_same_run(data, tmp_path, whole):
    run = tmp_path / "again"
    content = small.recipe(data, run, **STAGES)
    content["data"]["workers"] = 1
    small.run(small.write(tmp_path, content))
    same_run(whole, run)


def test_a_finished_run_says_so_and_changes_nothing(data, whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    train(load_recipe(whole / "recipe.yaml"))
    assert "complete" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_changed_recipe_is_refused_with_a_diff(whole):
    recipe = load_recipe(whole / "recipe.yaml")
    with pytest.raises(ValueError, match=r"(?s)another recipe.*-seed: 3.*\+seed: 4"):
        train(replace(recipe, seed=4))
    recipe.train.log_every = 7
    train(recipe)


def test_two_processes_cannot_train_one_run(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    path = small.write(tmp_path, small.recipe(data, run))
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.1)
    with runs.lock_run(RunFolder(run)), pytest.raises(ValueError, match="being trained by another process"):
        train(load_recipe(path))
