"""Storage faults, caused for real: full disks, read-only folders, damage, kills while writing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lclm.checkpoint import RunFolder, damage
from lclm.recipe import load_recipe
from lclm.train.ends import Requeue
from lclm.train.trainer import train
from tests.end_to_end import small_run as small

LIMIT = 240.0
"""Seconds after which a run that has not ended counts as hung."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.build_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run of the recipe of `content`, without checkpoints in the background."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(folder, content(data, folder / "run", save="sync", save_every_steps=None))
    return folder / "run"


def train_here(folder: Path, recipe: dict[str, Any]) -> None:
    """Train in this process: what ends it is raised."""
    train(load_recipe(small.write(folder, recipe)))


def content(data: Path, run: Path, steps: int = 12, zero: int = 0, **train: Any) -> dict[str, Any]:
    """A recipe with a checkpoint every second step, and no validation or probes in between."""
    recipe = small.recipe(data, run, joint=small.stage(steps))
    recipe["engine"]["zero"] = zero
    recipe["train"] = {"log_every": 1, "save_every_steps": 2, "validate_every": None} | train
    recipe["train"]["validate_batches"] = 0
    recipe["train"]["preflight"] = False  # it would see what is wrong before a step is taken
    recipe["probes"] |= {"samples": 2, "max_needle_tokens": 0}
    return recipe


def joint(run: Path):
    """The only stage's folder."""
    return RunFolder(run).stage(0, "joint")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in small.lines(run, "event") if line["event"] == name]


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it said) of a run; it must end."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        kill(process)
    return process.returncode, plain(output)


def plain(text: str) -> str:
    """The text without the borders and line breaks of the error panel."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def kill(process: subprocess.Popen[str]) -> None:
    """End a run and all its processes, without warning."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    """Wait until the condition holds while a run goes on."""
    until = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def same_run(first: Path, second: Path) -> None:
    """Both ended with the same losses and weights, bit for bit."""
    assert small.losses(first) == small.losses(second)
    before, after = small.weights(first / "export"), small.weights(second / "export")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def read(run: Path) -> str:
    return (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""


@pytest.fixture
def mounted(tmp_path):
    """mount(folder, *options): a mount that is gone after the test. Needs root."""
    folders = []

    def mount(folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting needs root: {done.stderr.strip()}")
        folders.append(folder)

    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting needs root and mount(8)")
    yield mount
    for folder in reversed(folders):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_checkpoint_that_fails_is_said_and_tried_again(data, tmp_path):
    """A file is in the way of the checkpoints: said, and the run goes on; without it, it writes again."""
    run = tmp_path / "run"
    stage = joint(run)
    stage.path.mkdir(parents=True)
    stage.checkpoints.write_text("in the way")
    process = small.start(small.write(tmp_path, content(data, run, steps=400, max_failed_saves=100)))
    wait_for(process, lambda: read(run).count('"save_failed"') >= 2)
    stage.checkpoints.unlink()
    wait_for(process, lambda: '"event": "checkpoint"' in read(run))
    process.send_signal(signal.SIGTERM)
    code, output = end(process)
    assert code == 75, output
    assert "CHECKPOINT NOT WRITTEN (step 2 of the stage; 1 in a row, 100 end the run)" in output
    assert "CHECKPOINT NOT WRITTEN (step 4 of the stage; 2 in a row, 100 end the run)" in output
    failed = events(run, "save_failed")
    assert [event["in_a_row"] for event in failed[:2]] == [1, 2]
    assert str(stage.checkpoints) in failed[0]["message"]
    assert stage.candidates()
    assert damage(stage.candidates()[0]) is None


@pytest.mark.slow
def test_a_full_disk_stops_the_run_after_some_tries_and_nothing_is_lost(
    data, tmp_path, whole, mounted, capsys
):
    """Checkpoints fill the disk: two tries, then the run ends; with fewer of them kept, it goes on."""
    disk = tmp_path / "disk"
    mounted(disk, "-t", "tmpfs", "-o", "size=2500k", "tmpfs")
    run = disk / "run"
    recipe = content(data, run, keep=20, save_every_steps=1, max_failed_saves=2)
    with pytest.raises(ValueError, match=r"2 checkpoints in a row \(train.max_failed_saves\)") as caught:
        train_here(tmp_path, recipe)
    newest = joint(run).candidates()[0]
    assert f"could not be written, and the newest checkpoint is {newest.name}" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert " 0 MiB are free there" in str(caught.value)
    assert "(step 2 of the stage" not in capsys.readouterr().out
    assert len(joint(run).candidates()) >= 2
    assert all(damage(one) is None for one in joint(run).candidates())
    recipe["train"]["keep"] = 1
    train_here(tmp_path, recipe)
    same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_that_cannot_save_says_so(data, tmp_path, mounted, processes):
    """The folder of checkpoints is read-only when the run is asked to stop: the exit code is not 75."""
    run = tmp_path / "run"
    stage = joint(run)
    path = small.write(tmp_path, content(data, run, steps=4000, zero=2, save_every_steps=50))
    process = small.start(path, processes)
    wait_for(process, stage.candidates)
    wait_for(process, lambda: not list(stage.checkpoints.glob("*.tmp")))
    mounted(stage.checkpoints, "--bind", str(stage.checkpoints))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(stage.checkpoints)], check=True)
    process.send_signal(signal.SIGTERM)
    code, output = end(process)
    assert "the last checkpoint could not be written, and the newest checkpoint is step-" in output
    assert "Read-only file system" in output
    assert code == (2 if processes == 1 else 1), output  # torchrun, which had the signal too, ends with 1


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(data, tmp_path):
    """As with a quota, writing fails on a disk that has room; snapshots in memory fail too."""
    run = tmp_path / "run"
    path = small.write(tmp_path, content(data, run, max_failed_saves=2))
    command = ["prlimit", f"--fsize={120 * 1024}", *small.command(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    code, output = end(process)
    assert code == 2, output
    assert "checkpoints are not written in the background: the snapshot in memory failed" in output
    assert "a file could not be written in full (no space, a quota, a limit?)" in output
    assert "there is no checkpoint of this stage" in output
    assert joint(run).candidates() == []


@pytest.mark.slow
def test_damaged_checkpoints_are_named_and_the_newest_whole_one_is_used(data, tmp_path, whole, capsys):
    run = tmp_path / "run"
    recipe = content(data, run, keep=4, stop_after_steps=8)
    with pytest.raises(Requeue):
        train_here(tmp_path, recipe)
    eight, six, four, two = joint(run).candidates()
    flip(next(eight.glob("engine/*.pt")))
    (six / "state.json").unlink()
    cut(four / "checksums.json")
    capsys.readouterr()
    recipe["train"]["stop_after_steps"] = 1
    with pytest.raises(Requeue, match="saved after step 3"):
        train_here(tmp_path, recipe)
    output = capsys.readouterr().out
    for one, what in ((eight, "is not the file that was written"), (six, "is missing"), (four, "is damaged")):
        assert re.search(rf"checkpoint {one.name} is damaged and is not used: \S+ {what}", output), output
    assert f"stage 01-joint goes on from {two.name}" in output
    assert sorted(path.name for path in joint(run).checkpoints.iterdir()) == [two.name, "step-00000003"]

    for one in joint(run).candidates():  # none is whole: the stage begins anew
        cut(next(one.glob("engine/*.pt")))
    recipe["train"]["stop_after_steps"] = None
    train_here(tmp_path, recipe)
    assert "no checkpoint of stage 01-joint is whole: the stage begins anew" in capsys.readouterr().out
    same_run(whole, run)


@pytest.mark.slow
def test_a_damaged_export_of_a_complete_stage_is_named(data, tmp_path):
    """Also a damaged done.json; removing what the message names repairs the run."""
    run = tmp_path / "run"
    recipe = content(data, run)
    recipe["stages"] = {"order": ["first", "second"], "first": small.stage(4), "second": small.stage(4)}
    recipe["train"]["stop_after_steps"] = 6
    with pytest.raises(Requeue):
        train_here(tmp_path, recipe)
    first = RunFolder(run).stage(0, "first")
    shutil.copytree(first.path, tmp_path / "kept")

    recipe["train"]["stop_after_steps"] = None
    flip(first.export / "model.safetensors")
    with pytest.raises(ValueError, match="the export of a complete stage is damaged") as caught:
        train_here(tmp_path, recipe)
    assert f"{first.export / 'model.safetensors'} is not the file that was written" in str(caught.value)
    assert f"or remove {first.path} and the stages after it: they are trained again" in str(caught.value)
    shutil.rmtree(first.path)
    shutil.copytree(tmp_path / "kept", first.path)

    done = json.loads(first.done.read_text())
    first.done.write_text(json.dumps(done | {"state": done["state"] | {"step": 5}}))
    with pytest.raises(
        ValueError, match=r"done\.json, which says how a complete stage ended, cannot be used"
    ):
        train_here(tmp_path, recipe)

    shutil.rmtree(run / "stages")
    train_here(tmp_path, recipe)
    flip(run / "export" / "model.safetensors")
    with pytest.raises(ValueError, match="export: it is copied again from"):
        train_here(tmp_path, recipe)
    shutil.rmtree(run / "export")
    train_here(tmp_path, recipe)
    assert small.weights(run / "export").keys() == small.weights(first.export).keys()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_while_checkpoints_are_written(data, tmp_path, processes):
    """Killed at random moments, a save at every step: nothing half-written counts; it ends the same."""
    seed, zero = time.time_ns(), processes
    print("seed", seed)
    draws = random.Random(seed)
    folder = tmp_path / "whole"
    folder.mkdir()
    small.run(small.write(folder, content(data, folder / "run", 30, zero, save="sync")), processes)
    run = tmp_path / "run"
    path = small.write(tmp_path, content(data, run, 30, zero, save_every_steps=1))
    checkpoints, kills = joint(run).checkpoints, 0
    while kills < 3:
        before = set(os.listdir(checkpoints)) if checkpoints.is_dir() else set()
        process = small.start(path, processes)
        wait_for(process, lambda known=before: checkpoints.is_dir() and set(os.listdir(checkpoints)) - known)
        time.sleep(draws.uniform(0.0, 0.5))
        if process.poll() is not None:
            break
        kills += 1
        everyone = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)  # the others end with it, also those that write
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert not alive
        process.communicate()
        assert all(damage(one) is None for one in joint(run).candidates())
    assert kills
    code, output = end(small.start(path, processes))
    assert code == 0, output
    assert "damaged" not in output
    same_run(folder / "run", run)


def flip(path: Path) -> None:
    """Turn one bit."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def cut(path: Path) -> None:
    """Take the second half away."""
    os.truncate(path, path.stat().st_size // 2)
