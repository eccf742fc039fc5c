"""What differs between processes, or is missing, is named before a run begins: in real processes."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lclm.recipe import load_recipe
from lclm.train import preflight
from lclm.train.lifeline import host_name
from lclm.train.preflight import differences
from tests.end_to_end import small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_run.build_data(tmp_path_factory.mktemp("corpus"))


def together(verb: str, paths: list[Path], changed: list[dict[str, str]], files: list[int | None]):
    """Run a verb in as many processes as there are recipes, each with its own environment and limit of open
    files; (exit codes, what they printed)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank, path in enumerate(paths):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(paths)),
            "LOCAL_WORLD_SIZE": str(len(paths)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "500",
        }
        limit = files[rank]
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "lclm", verb, str(path)],
                env=environment | changed[rank],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=limit and (lambda n=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))),
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in running]
    return [process.returncode for process in running], outputs


def shim(folder: Path) -> dict[str, str]:
    """An environment in which a version of liger-kernel is installed."""
    info = folder / "liger_kernel-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.0.1\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_the_process_that_differs_is_named_with_what_differs(data, tmp_path):
    content = small_run.recipe(data, tmp_path / "run")
    first = small_run.write(tmp_path, content)
    second = tmp_path / "edited.yaml"
    edited = content | {"seed": 4, "data": content["data"] | {"lookahead": 9}}
    second.write_text(yaml.safe_dump(edited, sort_keys=False))
    environment = shim(tmp_path / "site") | {"NCCL_ALGO": "Tree"}
    codes, outputs = together("train", [first, second], [{}, environment], [None, 512])
    assert codes == [2, 2], outputs
    said = " ".join(outputs[0].split())
    process, other = f"process 1 ({host_name()}):", f"process 0 ({host_name()})"
    assert f"{process} liger-kernel 0.0.1, {other}" in said
    assert f"{process} environment variable NCCL_ALGO Tree, {other} not set" in said
    assert f"{process} seed 4, {other} 3" in said
    assert f"{process} data.lookahead 9, {other} 8" in said
    assert f"{process} only 512 files may be open" in said
    assert "train.preflight=false" in said
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.slow
def test_two_equal_processes_are_well(data, tmp_path):
    path = small_run.write(tmp_path, small_run.recipe(data, tmp_path / "run"))
    codes, outputs = together("doctor", [path, path], [{}, {}], [None, None])
    assert codes == [0, 0], outputs
    assert "all is well" in outputs[0]
    assert "all-reduce: 16 MiB in" in outputs[0]
    assert "largest batch: stage only" in outputs[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_fit_comes_with_a_proposal(data, tmp_path):
    content = small_run.recipe(data, tmp_path / "run")
    layers = content["model"]["decoder"]["config"] | {"max_position_embeddings": 10_000_000}
    content["model"]["decoder"]["config"] = layers
    content["data"]["pack"] = {"positions": 3_000_000, "rows": 8, "latents": 80}
    codes, outputs = together("doctor", [small_run.write(tmp_path, content)], [{}], [None])
    said = " ".join(outputs[0].split())
    assert codes == [2], said
    assert "stage only does not fit into the" in said
    assert "by plan it takes" in said


def test_most_processes_are_right():
    hosts = ["a", "a", "b"]
    facts = [{"torch": "1"}, {"torch": "1"}, {"torch": "2", "extra": "x"}]
    assert differences(facts, hosts) == [
        "process 2 (b): torch 2, the others 1",
        "process 2 (b): extra x, the others not set",
    ]
    assert differences([{"torch": "1"}] * 3, hosts) == []
    assert differences([{"torch": "1"}, {"torch": "2"}], ["a", "b"]) == [
        "process 1 (b): torch 2, process 0 (a) 1"
    ]


def test_a_disk_too_small_is_told_before_the_first_step(data, tmp_path, monkeypatch):
    recipe = load_recipe(small_run.write(tmp_path, small_run.recipe(data, tmp_path / "run")))
    assert preflight._disk(recipe, {}) == []
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    (problem,) = preflight._disk(recipe, {})
    assert "lower train.keep" in problem
