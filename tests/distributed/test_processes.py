"""Two processes: the same global batches and losses as one, killed and resumed, poisoned together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.end_to_end import small_run as small
from tests.end_to_end.test_resume import kill_at, same_run

STEPS = 20


def small_recipe(data, folder, name, zero=0, **stages):
    content = small.recipe(data, folder / name, **(stages or {"only": small.stage(STEPS)}))
    content["engine"]["zero"] = zero
    content["train"] |= {"validate_batches": 0, "save_every_steps": 4}
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return small.write(folder, content), folder / name


def test_one_process_and_two_see_the_same_batches_and_losses(data, tmp_path):
    path, one = small_recipe(data, tmp_path, "one")
    small.run(path)
    path, two = small_recipe(data, tmp_path, "two", zero=2)
    small.run(path, processes=2)
    first, second = small.lines(one), small.lines(two)
    for name in ("loss_tokens", "source_tokens", "task_tokens"):
        assert [line[name] for line in first] == [line[name] for line in second]
    assert second[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    assert small.losses(two) == pytest.approx(small.losses(one), rel=1e-5)


@pytest.mark.parametrize(
    "zero", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_processes_killed_and_resumed(data, tmp_path, zero):
    stages = {"first": small.stage(8), "second": small.stage(4, learn=("encoder", "adapter"))}
    path, whole = small_recipe(data, tmp_path, "whole", zero, **stages)
    small.run(path, processes=2)
    path, parts = small_recipe(data, tmp_path, "parts", zero, **stages)
    kill_at(path, parts, 6, processes=2)
    small.run(path, processes=2)
    same_run(whole, parts)


@pytest.mark.slow
def test_muon_with_one_process_and_two(data, tmp_path):
    muon = small.stage(STEPS)
    for name in ("encoder", "decoder"):
        muon["learn"][name]["muon"] = {"lr": 0.01}
    runs = []
    for processes in (1, 2):
        path, run = small_recipe(data, tmp_path, f"muon{processes}", only=muon)
        small.run(path, processes)
        runs.append(small.losses(run))
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


def test_poison_on_one_process_is_left_out_on_both():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.poison"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.count("nothing changed") == 2
