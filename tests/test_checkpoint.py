"""The run folder: whole or absent, checksums, retention, provenance."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lclm.checkpoint import (
    CHECKSUMS,
    STATE,
    RunFolder,
    checksums,
    damage,
    list_files,
    provenance,
    read_json,
    set_aside,
    temporary,
    weights_fingerprint,
    write_folder,
    write_json,
)


def checkpoint(stage, step):
    def write(folder):
        (folder / "weights").write_bytes(bytes([step]))
        (folder / STATE).write_text("{}")
        write_json(folder / CHECKSUMS, {"files": checksums(folder, list_files(folder))})

    write_folder(stage.checkpoint(step), write)


def test_only_whole_checkpoints_are_candidates(tmp_path):
    stage = RunFolder(tmp_path).stage(0, "joint")
    assert stage.path.name == "01-joint"
    assert stage.candidates() == []
    for step in (1, 2, 10):
        checkpoint(stage, step)
    temporary(stage.checkpoint(11)).mkdir()
    (stage.checkpoints / "step-00000012.damaged").mkdir()
    assert [path.name for path in stage.candidates()] == ["step-00000010", "step-00000002", "step-00000001"]
    stage.prune(1)
    assert [path.name for path in stage.candidates()] == ["step-00000010"]
    assert [path.name for path in stage.checkpoints.iterdir()] == ["step-00000010"]


def test_damage_is_found(tmp_path):
    stage = RunFolder(tmp_path).stage(0, "joint")
    checkpoint(stage, 1)
    folder = stage.checkpoint(1)
    assert damage(folder) is None
    (folder / "weights").write_bytes(b"x")
    assert "weights" in damage(folder)
    assert damage(folder, 0, 2) is None
    assert "weights" in damage(folder, 1, 2)
    (folder / "weights").unlink()
    assert "missing" in damage(folder)


def test_a_checkpoint_without_checksums_is_damaged(tmp_path):
    stage = RunFolder(tmp_path).stage(0, "joint")
    checkpoint(stage, 1)
    folder = stage.checkpoint(1)
    for content in (
        "{",
        "[]",
        '{"files": []}',
        '{"files": {"state.json": {}}}',
        '{"files": {"weights": {}}}',
    ):
        (folder / CHECKSUMS).write_text(content)
        assert CHECKSUMS in damage(folder)
    (folder / CHECKSUMS).unlink()
    assert damage(folder) == f"{folder / CHECKSUMS} is missing"
    assert stage.candidates() == [folder]
    set_aside(folder)
    assert stage.candidates() == []


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, Path.rename

    def watch_fsync(file):
        done.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def watch_rename(path, target):
        done.append(f"{path} -> {target}")
        return rename(path, target)

    def write(folder):
        (folder / "a").mkdir()
        (folder / "a" / "weights").write_text("x")

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    final = tmp_path / "final"
    write_folder(final, write)
    beside = temporary(final)
    assert set(done[:3]) == {str(beside / "a" / "weights"), str(beside / "a"), str(beside)}
    assert done[3:] == [f"{beside} -> {final}", str(tmp_path)]


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"export: .*No space left.*MiB are free"):
        write_folder(tmp_path / "export", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for text in ("one", "two"):
        write_folder(tmp_path / "export", lambda folder, text=text: (folder / text).write_text(text))
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "two"]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        read_json(tmp_path / "state.json")


def test_fingerprint_sees_every_bit():
    weights = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    first = weights_fingerprint(weights.items())
    assert first == weights_fingerprint(reversed(weights.items()))
    weights["a"][1] = 1e-30
    assert first != weights_fingerprint(weights.items())


def test_provenance_holds_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    monkeypatch.setenv("RANK", "3")
    found = provenance(7, {"sources.x": "abc"})
    assert "secret-token" not in json.dumps(found)
    assert found["launcher"]["RANK"] == "3"
    assert found["versions"]["torch"].startswith("2.")
    assert found["data"] == {"sources.x": "abc"}
