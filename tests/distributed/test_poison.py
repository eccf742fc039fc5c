"""Bad data in two processes: left out together, counted alike, and too much of it stops all with code 2."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lclm.data.shards import DataSet
from tests.end_to_end import poisoned
from tests.end_to_end import small_run as small

SPIKE = 16
"""The step that meets the garbage: its data begin just before."""


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    return poisoned.build_data(tmp_path_factory.mktemp("easy"))


def events(run: Path, name: str) -> list[dict]:
    return [line for line in small.lines(run, "event") if line["event"] == name]


def start_two(path: Path, folders: tuple[Path, Path]) -> list[tuple[int, str]]:
    """Exit code and output of two processes of one run, each with a working folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = str(Path(__file__).parents[2])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "lclm", "train", str(path)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, outputs, strict=True)]


def words(text: str) -> str:
    """What was printed, whatever its line breaks and frames."""
    return " ".join(text.replace("│", " ").split())


def flip(data: Path, samples: list[int]) -> list[str]:
    """Flip a bit of some samples of the first shard; their keys."""
    folder = data / "documents" / "train"
    found = DataSet.open(str(folder))
    keys = [sample.key for sample in found.read(0, 0, max(samples) + 1)]
    file = folder / found.shards[0].file
    content = bytearray(file.read_bytes())
    for offset, size, _, _ in found.index(0)[samples].tolist():
        content[offset + size // 2] ^= 2
    file.write_bytes(content)
    return [keys[sample] for sample in samples]


def test_too_much_damage_stops_both_with_the_same_message(easy, tmp_path):
    data = Path(shutil.copytree(easy, tmp_path / "data"))
    flip(data, list(range(6)))
    (data / "documents" / "train" / "shard-00001.tar").unlink()
    content = poisoned.recipe(data, tmp_path / "run", save_every_steps=None)
    content["data"] |= {"epochs": 1, "reading": {"retries": 1, "max_skipped": 3, "max_skipped_share": 0.01}}
    content["engine"]["zero"] = 2
    first, second = start_two(small.write(tmp_path, content), (tmp_path, tmp_path))
    assert first[0] == second[0] == 2, first[1] + second[1]
    for text in (words(first[1]), words(second[1])):
        assert "samples read so far could not be used (documents: " in text
        assert "data.reading.max_skipped=3 and max_skipped_share=0.01 allow" in text
        assert "shard-0000" in text and "lclm data verify" in text


@pytest.mark.slow
def test_one_process_with_bad_data_stops_both(easy, tmp_path):
    """As where one machine's own copy of the data is damaged."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        shutil.copytree(easy, folder / "data")
    for file in (folders[1] / "data" / "documents" / "train").glob("*.tar"):
        file.unlink()
    content = poisoned.recipe(Path("data"), tmp_path / "run")
    content["data"] |= {"lookahead": 300}
    first, second = start_two(small.write(tmp_path, content), folders)
    assert first[0] == second[0] == 2, first[1] + second[1]
    for text in (words(first[1]), words(second[1])):
        assert "documents: shard missing" in text and "shard-0000" in text
    shutil.rmtree(folders[1] / "data" / "documents")
    first, second = start_two(small.write(tmp_path, content), folders)
    assert first[0] == second[0] == 2
    assert all("manifest.json" in words(text) for _, text in (first, second))


@pytest.mark.slow
def test_a_little_damage_is_left_out_alike(easy, tmp_path):
    data = Path(shutil.copytree(easy, tmp_path / "data"))
    flip(data, [1, 4])
    runs = []
    for name, processes in (("one", 1), ("two", 2), ("clean", 1)):
        content = poisoned.recipe(easy if name == "clean" else data, tmp_path / name, steps=40)
        content["data"]["epochs"] = 1
        content["engine"]["zero"] = 1 if processes == 2 else 0
        output = small.run(small.write(tmp_path, content), processes)
        runs.append(tmp_path / name)
    one, two, clean = runs
    assert "data left out: {'documents: wrong checksum': 1}" not in output
    for run in (one, two):
        assert small.lines(run)[-1]["dropped"] == {"documents: wrong checksum": 2}
        (event,) = events(run, "damage")
        assert list(event["found"]) == ["documents: wrong checksum"]
        assert event["files"][0].endswith("shard-00000.tar (wrong checksum)")
    assert small.lines(clean)[-1]["dropped"] == {} and not events(clean, "damage")
    assert [line["source_tokens"] for line in small.lines(one)] == [
        line["source_tokens"] for line in small.lines(two)
    ]
    assert small.losses(two) == pytest.approx(small.losses(one), rel=1e-5)


@pytest.mark.slow
def test_a_jump_of_the_loss_is_left_out_on_both(easy, tmp_path):
    runs = {}
    for processes in (1, 2):
        content = poisoned.recipe(easy, tmp_path / f"run{processes}", steps=24, spike=poisoned.spike())
        content["engine"]["zero"] = 2 if processes == 2 else 0
        small.run(small.write(tmp_path, content), processes)
        runs[processes] = tmp_path / f"run{processes}"
    found = {processes: events(run, "skip") for processes, run in runs.items()}
    steps = [event["step"] for event in found[1]]
    assert SPIKE in steps and len(steps) <= 3
    assert [event["step"] for event in found[2]] == steps
    for event, other in zip(*found.values(), strict=True):
        assert event["reason"] == "spike" and event["keys"] == other["keys"]
        assert event["keys"][0].startswith(poisoned.KEY)
        assert event["loss"] > 1.2 * event["expected"]
    one, two = (small.lines(run) for run in runs.values())
    assert [line.get("loss") for line in two] == [
        pytest.approx(line.get("loss"), rel=1e-4) if "loss" in line else None for line in one
    ]


@pytest.mark.slow
def test_going_back_before_a_jump_and_on_after_it(easy, tmp_path):
    """Twice: whole, and in parts that stop and go on around it; the same, bit for bit."""
    for name in ("whole", "parts"):
        spike = poisoned.spike(action="rewind", max_rewinds=1)
        more = {"stop_after_steps": 10} if name == "parts" else {}
        content = poisoned.recipe(easy, tmp_path / name, steps=24, spike=spike, save_every_steps=6, **more)
        content["engine"]["zero"] = 2
        path, starts, code = small.write(tmp_path, content), 0, 75
        while code == 75 and starts < 6:
            code, output = ended(path, 2)
            starts += 1
        assert code == 0, output[-3000:]
        assert (starts > 1) == (name == "parts")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (event,) = events(whole, "rewind")
    assert event["from_step"] == SPIKE and event["keys"][0].startswith(poisoned.KEY)
    assert event["step"] == 12 and event["rewinds"] == 1
    for run in (whole, parts):
        assert [line["step"] for line in small.lines(run)] == list(range(1, 25))
        assert len(events(run, "rewind")) == 1
    first, second = ([line.get("loss") for line in small.lines(run)] for run in (whole, parts))
    assert first == second
    before, after = small.weights(whole / "export"), small.weights(parts / "export")
    assert all(torch.equal(before[name], after[name]) for name in before)


def ended(path: Path, processes: int) -> tuple[int, str]:
    """The processes' exit code (0 or what torchrun says it was) and what they printed."""
    process = small.start(path, processes)
    output, _ = process.communicate(timeout=300)
    codes = re.findall(r"exitcode\s*: *(-?\d+)", output)
    return (int(codes[0]) if codes else process.returncode), output
