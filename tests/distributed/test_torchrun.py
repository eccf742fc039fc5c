"""One machine through launch/torchrun.sh: a killed process is started again, then given up with code 76."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.hosts import training
from tests.distributed.tiny import same_curve, steps_made, tiny

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"


def launch(path: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    log = path.with_suffix(".log").open("ab")
    command = [SCRIPT, *options, "2", path]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def workers(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return training(psutil.Process(launcher.pid).children())


def kill_a_process_at(launcher: subprocess.Popen[bytes], run: Path, steps: int) -> list[int]:
    """Kill the second process once so many steps are made; the process ids there were."""
    until = time.monotonic() + 200
    while steps_made(run) < steps:
        assert launcher.poll() is None and time.monotonic() < until, run.with_suffix(".log").read_text()
        time.sleep(0.05)
    found = workers(launcher)
    found[-1].send_signal(signal.SIGKILL)
    return [process.pid for process in found]


def test_killed_processes_are_started_again_as_often_as_allowed(data, one, tmp_path):
    run = tmp_path / "run"
    path = tiny(data, run, 1)
    launcher = launch(path, "--restarts=1")
    try:
        first = kill_a_process_at(launcher, run, 5)
        until = time.monotonic() + 200
        while not (now := workers(launcher)) or any(process.pid in first for process in now):
            assert time.monotonic() < until, path.with_suffix(".log").read_text()
            time.sleep(0.1)
        kill_a_process_at(launcher, run, 10)
        assert launcher.wait(timeout=200) == 76, path.with_suffix(".log").read_text()
        launcher = launch(path)
        assert launcher.wait(timeout=300) == 0, path.with_suffix(".log").read_text()
    finally:
        launcher.kill()
    same_curve(one, run)
