"""Checkpoints of one process, in the background and at once; what cannot be written is tried again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from lclm.checkpoint import STATE, RunFolder, damage, read_json
from lclm.train.saver import Saver
from lclm.train.saving import Identity, State, newest_checkpoint
from lclm.train.settings import TrainSettings
from lclm.train.snapshot import PREFIX, SnapshotFolder
from tests.train import toy

IDENTITY = Identity("run", "frozen", 1, "fp32", 1)


class Watched:
    """A saver of a toy engine, and what it said."""

    def __init__(self, path: Path, engine, **settings) -> None:
        self.events: list[dict] = []
        self.said: list[str] = []
        self.engine, self.stage = engine, RunFolder(path).stage(0, "joint")
        self.memory = path / "memory"
        self.memory.mkdir()
        settings = {"snapshot_folder": str(self.memory)} | settings
        self.saver = Saver(
            engine, self.stage, IDENTITY, TrainSettings(**settings), 1.0, self.event, self.said.append
        )

    def event(self, name, **figures):
        self.events.append({"event": name, **figures})

    def names(self):
        return [path.name for path in self.stage.candidates()]


@pytest.fixture(scope="module")
def engine():
    engine, _ = toy.make(1, "fp32")
    step(engine)
    yield engine
    engine.close()


@pytest.fixture
def watched(tmp_path, engine):
    made = []

    def make(**settings):
        made.append(Watched(tmp_path, engine, **settings))
        return made[-1]

    yield make
    for one in made:
        one.saver.__exit__(None)


def step(engine):
    """A step that changes the weights in place."""
    x, y = torch.randn(2, 8), torch.randn(2, 4)
    engine.apply_settings(1.0)
    engine.deepspeed.backward(engine.deepspeed(x, y))
    engine.deepspeed.step()


def tensors(folder: Path):
    """All tensors of a checkpoint, in order."""
    found = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            found.append(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    for path in sorted((folder / "engine").glob("*.pt")):
        walk(torch.load(path, weights_only=False))
    return found


def test_the_background_writes_what_a_save_at_once_writes(watched, tmp_path):
    one = watched()
    one.saver.save(State(step=7, stage_step=7))
    one.saver.save(State(step=8, stage_step=8), now=True)
    assert one.names() == ["step-00000008", "step-00000007"]
    assert all(damage(path) is None for path in one.stage.candidates())
    later, earlier = map(tensors, one.stage.candidates())
    assert len(later) > 5
    assert all(torch.equal(a, b) for a, b in zip(later, earlier, strict=True))
    assert read_json(one.stage.checkpoint(7) / STATE)["state"]["step"] == 7
    assert [(e["event"], e["save"]) for e in one.events] == [("checkpoint", "async"), ("checkpoint", "sync")]
    assert list(one.memory.glob(f"{PREFIX}*/snapshot/*")) == []


def test_a_snapshot_is_of_one_step(watched, engine):
    """Weights that change while a checkpoint is being written do not reach it."""
    one = watched()
    before = [
        parameter.detach().clone() for parameter in engine.model.parameters() if parameter.requires_grad
    ]
    one.saver.save(State(stage_step=1))
    for _ in range(3):
        step(engine)
    one.saver.settle()
    written = torch.load(next(one.stage.checkpoint(1).glob("engine/mp*")), weights_only=False)["module"]
    assert len(written) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, written.values(), strict=True))


@pytest.mark.parametrize("save", ["async", "sync"])
def test_what_cannot_be_written_is_tried_again_and_then_ends_the_run(watched, save):
    one = watched(save=save, max_failed_saves=3)
    one.stage.path.mkdir(parents=True)
    one.stage.checkpoints.write_text("in the way")
    for number in (1, 2):
        one.saver.save(State(stage_step=number))
    assert [event["in_a_row"] for event in one.events if event["event"] == "save_failed"] == [1, 2]
    assert "CHECKPOINT NOT WRITTEN (step 2 of the stage; 2 in a row, 3 end the run)" in one.said[-1]
    one.stage.checkpoints.unlink()
    one.saver.save(State(stage_step=3))
    one.saver.settle()
    assert one.names() == ["step-00000003"]
    assert one.saver.failed_in_a_row == 0
    shutil.move(one.stage.checkpoints, one.stage.path / "kept")
    one.stage.checkpoints.write_text("in the way")
    one.saver.save(State(stage_step=4))
    one.saver.save(State(stage_step=5))
    with pytest.raises(
        ValueError, match=r"3 checkpoints in a row .*could not be written.*no checkpoint of this"
    ):
        one.saver.save(State(stage_step=6))
    with pytest.raises(ValueError, match="the last checkpoint could not be written"):
        one.saver.save(State(stage_step=7), now=True)


def test_a_writer_that_is_killed_is_noticed_at_the_next_step(watched):
    one = watched()
    one.saver.save(State(stage_step=1))
    one.saver.settle()
    writer = one.saver._writer._process.pid
    os.kill(writer, signal.SIGSTOP)
    one.saver.save(State(stage_step=2))
    assert not one.saver.failed
    os.kill(writer, signal.SIGKILL)
    until = time.monotonic() + 60
    while not one.saver.failed and time.monotonic() < until:
        time.sleep(0.01)
    assert one.saver.failed
    one.saver.after_step(True)
    assert "the process that writes checkpoints ended with code -9" in one.said[-1]
    assert one.names() == ["step-00000001"]
    assert list(one.stage.checkpoints.glob("*.tmp")) == []
    one.saver.save(State(stage_step=3))
    one.saver.settle()
    assert one.names() == ["step-00000003", "step-00000001"]


def test_a_disk_that_hangs_is_not_waited_for_without_end(watched, monkeypatch):
    one = watched()
    one.saver.save(State(stage_step=1))
    one.saver.settle()
    os.kill(one.saver._writer._process.pid, signal.SIGSTOP)
    one.saver.save(State(stage_step=2))
    one.saver._seconds = 0.5
    one.saver.settle()
    assert "not on the disk after" in one.said[-1]
    one.saver.save(State(stage_step=3), now=True)
    assert one.names() == ["step-00000003", "step-00000001"]


def test_a_save_waits_for_the_one_before_and_says_so(watched):
    one = watched()
    one.saver.save(State(stage_step=1))
    one.saver.settle()
    writer = one.saver._writer._process.pid
    os.kill(writer, signal.SIGSTOP)
    one.saver.save(State(stage_step=2))
    threading.Timer(1.5, os.kill, (writer, signal.SIGCONT)).start()
    one.saver.save(State(stage_step=3), now=True)
    assert one.names() == ["step-00000003", "step-00000002"]
    assert re.fullmatch(r"waited \d+\.\d s for step-00000002 to be on the disk", one.said[-1])


def test_without_room_in_memory_checkpoints_are_written_at_once(watched, engine, monkeypatch):
    one = watched(snapshot_folder="/nowhere")
    one.saver.save(State(stage_step=1))
    one.saver.save(State(stage_step=2))
    assert one.names() == ["step-00000002", "step-00000001"]
    assert one.said == ["checkpoints are not written in the background: there is no folder /nowhere"]
    monkeypatch.setattr("lclm.train.saver.room", lambda parent: 1000.0)
    one.saver._settings.snapshot_folder = str(one.memory)
    one.saver.save(State(stage_step=3))
    assert "snapshots need" in one.said[-1]
    assert one.events[-1]["save"] == "sync"


def test_left_over_snapshots_are_removed_and_those_in_use_are_not(tmp_path):
    left = tmp_path / f"{PREFIX}left"
    (left / "snapshot").mkdir(parents=True)
    first = SnapshotFolder(tmp_path)
    assert not left.exists()
    second = SnapshotFolder(tmp_path)
    assert first.path.is_dir()
    assert second.path.is_dir()
    first.close()
    second.close()
    assert list(tmp_path.glob(f"{PREFIX}*/")) == []


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"flipped": flip, "cut": cut, "removed": os.remove}


@pytest.mark.parametrize("damage_one", DAMAGES.values(), ids=DAMAGES.keys())
def test_any_damage_leads_to_the_checkpoint_before(watched, engine, damage_one):
    """Whichever file of the newest checkpoint is damaged, however, the one before is used, and it is said."""
    one = watched(keep=3)
    for number in (1, 2):
        one.saver.save(State(stage_step=number), now=True)
    whole = one.stage.path / "whole"
    shutil.copytree(one.stage.checkpoints, whole)
    names = [path.relative_to(whole / "step-00000002") for path in (whole / "step-00000002").rglob("*")]
    files = [name for name in names if (whole / "step-00000002" / name).is_file()]
    assert {"checksums.json", "state.json"} < {str(name) for name in files}
    for name in files:
        shutil.rmtree(one.stage.checkpoints)
        shutil.copytree(whole, one.stage.checkpoints)
        damage_one(one.stage.checkpoint(2) / name)
        one.said.clear()
        found = newest_checkpoint(one.stage, engine.processes, one.said.append)
        assert found == one.stage.checkpoint(1), name
        assert str(name) in one.said[0] or "checksums.json" in one.said[0]
        assert one.said[0].startswith("checkpoint step-00000002 is damaged and is not used")
        assert one.said[1] == "stage 01-joint goes on from step-00000001"
        assert one.names() == ["step-00000001"]  # the damaged one neither counts for `keep` nor hides it
    one.saver.save(State(stage_step=3))
    one.saver.settle()
    assert sorted(os.listdir(one.stage.checkpoints)) == ["step-00000001", "step-00000003"]


def test_no_whole_checkpoint_is_said(watched, engine):
    one = watched()
    one.saver.save(State(stage_step=1), now=True)
    cut(one.stage.checkpoint(1) / STATE)
    assert newest_checkpoint(one.stage, engine.processes, one.said.append) is None
    assert one.said[-1] == (
        "no checkpoint of stage 01-joint is whole: the stage begins anew, and its steps are lost"
    )
