"""A process that is slowed while it trains is named, with its host and what it is slow at."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lclm.train.lifeline import host_name
from tests.end_to_end import small_run


def process_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The id of the training process of that rank below a launcher."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                below = f"PPid:\t{launcher.pid}\n" in (folder / "status").read_text()
            except OSError:
                continue
            if below and f"RANK={rank}".encode() in environment:
                return int(folder.name)
        time.sleep(0.2)
    raise AssertionError("the process did not start")


def slow_down(pid: int, stop: threading.Event) -> None:
    """Let a process run only a fifth of the time."""
    try:
        while not stop.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.08)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)
    except ProcessLookupError:
        pass


@pytest.mark.slow
def test_a_slowed_process_is_named(data, tmp_path):
    content = small_run.recipe(data, tmp_path / "run", only=small_run.stage(steps=400))
    content["train"] |= {
        "log_every": 10,
        "save_every_steps": None,
        "validate_batches": 0,
        "stop_after_steps": 200,
    }
    path = small_run.write(tmp_path, content)
    launcher = small_run.start(path, processes=2)
    stop, lines = threading.Event(), tmp_path / "run" / "metrics.jsonl"
    pid = process_of(launcher, 1)
    until = time.monotonic() + 120
    while not (lines.is_file() and len(lines.read_text().splitlines()) > 3) and time.monotonic() < until:
        time.sleep(0.1)
    slowing = threading.Thread(target=slow_down, args=(pid, stop))
    slowing.start()
    try:
        output, _ = launcher.communicate(timeout=300)
    finally:
        stop.set()
        slowing.join()
    slow = [line for line in small_run.lines(tmp_path / "run", "event") if line["event"] == "slow"]
    assert slow, output[-3000:]
    assert {(line["process"], line["host"]) for line in slow} == {(1, host_name())}
    assert slow[0]["seconds"] > 1.5 * slow[0]["others"]
    assert f"process 1 ({host_name()}) is slow" in output
    train = small_run.lines(tmp_path / "run")
    assert train[-1]["processes"]["forward"]["process"] == 1
