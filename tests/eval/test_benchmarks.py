"""The benchmarks' plain implementation is the same mathematics, and their programs run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def workload(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import workload

    return workload


@pytest.mark.parametrize("settings", [None, {}], ids=["tiny", "untied, no place in block"])
def test_packed_and_plain_have_equal_losses_and_gradients(workload, settings):
    from dataclasses import replace

    size = workload.SIZES["tiny"]
    size = size if settings is None else replace(size, settings=settings)
    model = workload.make_model(size, torch.device("cpu"), torch.float32)
    rows = workload.make_rows(size, model.config.geometry(), np.random.default_rng(0))
    batch = workload.packed(rows, size, model.config.geometry(), torch.device("cpu"))
    assert workload.check_equal(model, workload.Plain(model, rows, size), batch) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "train_step"])
def test_programs_write_results(name, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--sizes", "tiny", "--rounds", "3"]
    subprocess.run([*command, "--name", str(tmp_path / "out")], check=True, capture_output=True, timeout=300)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["rows"] and content["machine"] and content["date"]
    assert (tmp_path / "out.md").read_text().count("| tiny |") == len(content["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--no-deepspeed"], ["--offload"]], ids=["plain torch", "offload"])
def test_the_step_at_size_runs_in_small(more, tmp_path):
    """The program for large GPUs, as it is, at toy size."""
    command = [sys.executable, str(BENCHMARKS / "step_at_size.py"), "--quick", "--rounds", "3"]
    options = ["--stages", "adapter", "joint", "--device", "cpu", "--name", str(tmp_path / "out")]
    subprocess.run([*command, *options, *more], check=True, capture_output=True, timeout=600)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {(row["stage"], row["loop"], row["attention"]) for row in rows} == {
        (stage, *kind)
        for stage in ("adapter", "joint")
        for kind in (("lclm", "sdpa"), ("lclm", "eager"), ("plain", "sdpa"))
    }
    for row in rows:
        alike = [other["loss"] for other in rows if other["stage"] == row["stage"]]
        assert row["loss"] == pytest.approx(alike[0], rel=1e-3)
        assert 0 < row["MFU %"] < 100


@pytest.mark.slow
def test_the_simulation_of_many_ranks_holds_what_it_must(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "simulate.py"), "--ranks", "32", "--steps", "1", "--quick"]
    subprocess.run(
        [*command, "--name", str(tmp_path / "out")],
        check=True,
        capture_output=True,
        timeout=900,
        cwd=BENCHMARKS.parent,
    )
    parts = ("order", "once", "balance", "resume", "memory")
    rows = {part: json.loads((tmp_path / f"out_{part}.json").read_text())["rows"] for part in parts}
    assert [row["ranks"] for row in rows["order"]] == [32, 8, 1]
    assert {row["resumed step equal"] for row in rows["order"]} == {"True"}
    assert {row["first step equal"] for row in rows["order"]} == {"", "True"}
    (once,) = rows["once"]
    assert once["samples read whole, once"] == 320 and once["steps"] > 4
    assert not once["samples with a token lost, added or out of place"] and not once["examples seen twice"]
    worst = {(row["case"], row["ranks"], row["work"]): row["largest"] for row in rows["balance"]}
    assert worst["recipe", 32, "decoder"] <= 1.05 < worst["recipe, attention: null", 32, "decoder"]
    assert worst["recipe", 32, "encoder"] <= 1.05
    assert len(rows["resume"]) == 8 and len(rows["memory"]) == 4
