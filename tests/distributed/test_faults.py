"""Signals, time limits, processes that are lost or stuck: exit codes, messages, and the run that goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lclm.train.ends import AGAIN_SECONDS, LOST, REQUEUE, WRONG
from tests.end_to_end import small_run as small
from tests.end_to_end.test_resume import same_run

STEPS, TIMEOUT_MINUTES = 40, 0.5
PATIENCE = 200.0
"""Seconds until a test gives up waiting: many times what is expected, for busy machines."""


@dataclass
class Started:
    """Processes of one run, started without a launcher: what each of them ends with can be seen."""

    processes: list[subprocess.Popen]
    outputs: list[Path]

    def __getitem__(self, rank):
        return self.processes[rank]

    def kill(self, number, rank=None):
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.send_signal(number)

    def codes(self, seconds=PATIENCE):
        """Exit codes, all within a time."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(
                "\n".join(self.said(rank)[-3000:] for rank in range(len(self.outputs)))
            ) from None

    def said(self, rank=0):
        """What a process printed, without line breaks and borders."""
        return " ".join(re.sub("[│╭╮╰╯─]", " ", self.outputs[rank].read_text()).split())

    def wait_for(self, condition):
        """Wait until something is true while all processes run."""
        until = time.monotonic() + PATIENCE
        while not condition():
            ended = [rank for rank, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended and time.monotonic() < until, self.said(ended[0] if ended else 0)[-3000:]
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    """start(command, n, **environment): n processes of a command; killed at the test's end."""
    everyone = []

    def start(command, count=1, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
        if count > 1:
            shared |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        outputs = [tmp_path / f"said-{len(everyone)}-{rank}.txt" for rank in range(count)]
        processes = []
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            with output.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        command, env=shared | own, stdout=file, stderr=file, start_new_session=True
                    )
                )
        everyone.extend(processes)
        return Started(processes, outputs)

    yield start
    for process in everyone:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def recipe(data, folder, name="run", steps=STEPS, **train):
    stages = {"first": small.stage(steps), "second": small.stage(3, learn=("adapter", "brackets"))}
    content = small.recipe(data, folder / name, **stages)
    content["engine"]["timeout_minutes"] = TIMEOUT_MINUTES
    content["train"] |= {"validate_batches": 0, "save_every_steps": None, "log_every": 1} | train
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return small.write(folder, content), folder / name


def training(path, *overrides):
    return [*small.command(path), *overrides]


def at_step(run, step):
    """Whether the run has written the line of a step."""
    with contextlib.suppress(FileNotFoundError):
        return any(line["step"] >= step for line in small.lines(run))
    return False


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run of `recipe` that nobody disturbed, with one process."""
    path, run = recipe(data, tmp_path_factory.mktemp("whole"))
    small.run(path)
    return run


# Asked to stop: saved, 75, and the same run in the end.


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(data, tmp_path, start, whole):
    path, run = recipe(data, tmp_path)
    running = start(training(path))
    running.wait_for(lambda: at_step(run, 3))
    running.kill(signal.SIGTERM)
    assert running.codes() == [REQUEUE]
    assert "SIGTERM; saved after step" in running.said()
    assert start(training(path)).codes() == [0]
    same_run(whole, run)


@pytest.mark.slow
def test_a_number_of_steps_a_start_goes_on_bit_for_bit(data, tmp_path, start, whole):
    path, run = recipe(data, tmp_path)
    for last in (15, 30):
        running = start(training(path, "train.stop_after_steps=15"))
        assert running.codes() == [REQUEUE]
        assert f"train.stop_after_steps=15; saved after step {last};" in running.said()
    assert start(training(path)).codes() == [0]
    same_run(whole, run)


@pytest.mark.slow
def test_limits_of_time_end_a_start_with_what_it_made_saved(data, tmp_path, start):
    path, run = recipe(data, tmp_path, steps=100_000, log_every=10)
    began = time.monotonic()
    assert start(training(path, "train.stop_after_steps=1")).codes() == [REQUEUE]
    enough = 5 + 2 * (time.monotonic() - began)  # for some steps, however slow the machine
    in_time = {"SLURM_JOB_END_TIME": str(int(time.time() + 300 + enough))}
    running = start(training(path, "train.stop_before_limit_minutes=5"), **in_time)
    assert running.codes() == [REQUEUE]
    assert re.search(r"the scheduler's time limit is \d\.\d minutes away; saved after step", running.said())
    made = small.lines(run)[-1]["step"]
    limit = f"train.stop_after_minutes={round(enough / 60, 3):g}"
    running = start(training(path, limit))
    assert running.codes() == [REQUEUE]
    assert f"{limit}; saved after step" in running.said()
    assert small.lines(run)[-1]["step"] > made
    assert len(list((run / "stages" / "01-first" / "checkpoints").glob("step-*"))) == 2


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_together(data, tmp_path, start):
    path, whole = recipe(data, tmp_path, "undisturbed")
    assert start(training(path), 2).codes() == [0, 0]
    path, run = recipe(data, tmp_path)
    running = start(training(path), 2)
    running.wait_for(lambda: at_step(run, 3))
    running.kill(signal.SIGUSR1, rank=1)
    assert running.codes() == [REQUEUE, REQUEUE]
    assert "another process was asked to stop; saved after step" in running.said(0)
    assert "SIGUSR1; saved after step" in running.said(1)
    assert start(training(path), 2).codes() == [0, 0]
    same_run(whole, run)


@pytest.mark.slow
def test_a_signal_at_any_other_time_ends_soon_and_loses_nothing(data, tmp_path, start, whole):
    path, run = recipe(data, tmp_path)
    moments = [0.5, 3.0, lambda: (run / "recipe.yaml").exists(), lambda: at_step(run, STEPS)]
    for moment in moments:
        running = start(training(path))
        if callable(moment):
            running.wait_for(moment)
        else:
            time.sleep(moment)
        running.kill(signal.SIGTERM)
        code = running.codes()[0]
        assert code == REQUEUE or (moment == 0.5 and code == -signal.SIGTERM), running.said()
    assert at_step(run, STEPS)
    assert start(training(path)).codes() == [0]
    same_run(whole, run)
    assert [line["step"] for line in small.lines(run)] == list(range(1, STEPS + 4))


@pytest.mark.slow
def test_a_second_signal_ends_at_once(data, tmp_path, start):
    path, run = recipe(data, tmp_path, steps=4000)
    running = start([*training(path), "data.workers=1", "data.prefetch=2"])
    running.wait_for(lambda: at_step(run, 3))
    workers = psutil.Process(running[0].pid).children()
    for worker in workers:
        worker.suspend()  # no step ends any more
    time.sleep(2)
    running.kill(signal.SIGTERM)
    time.sleep(AGAIN_SECONDS + 1)
    running.kill(signal.SIGTERM)
    assert running.codes(20) == [REQUEUE]
    assert "SIGTERM again: ending at once" in running.said()
    assert not psutil.wait_procs(workers, timeout=20)[1], "they go on without it"


@pytest.mark.slow
def test_a_second_run_on_the_same_directory_refuses(data, tmp_path, start):
    path, run = recipe(data, tmp_path, steps=4000)
    first = start(training(path))
    first.wait_for(lambda: at_step(run, 1))
    second = start(training(path))
    assert second.codes() == [WRONG]
    assert "is being trained by another process" in second.said()
    first.wait_for(lambda: at_step(run, 5))


# Lost and stuck processes of a training run.


def test_a_killed_process_is_named_by_the_other(data, tmp_path, start):
    path, run = recipe(data, tmp_path, steps=4000)
    running = start(training(path), 2)
    running.wait_for(lambda: at_step(run, 3))
    running.kill(signal.SIGKILL, rank=1)
    began = time.monotonic()
    assert running.codes() == [LOST, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    said = running.said(0)
    assert f"process 1 ({socket.gethostname()}) does not answer" in said and "step " in said
    assert "most recent call first" in (run / "faults" / "process-0000.txt").read_text()


@pytest.mark.slow
def test_a_killed_main_process_is_named_and_the_run_goes_on(data, tmp_path, start):
    path, whole = recipe(data, tmp_path, "undisturbed")
    assert start(training(path), 2).codes() == [0, 0]
    path, run = recipe(data, tmp_path, save_every_steps=5)
    running = start(training(path), 2)
    running.wait_for(lambda: at_step(run, 12))
    running.kill(signal.SIGKILL, rank=0)
    assert running.codes() == [-signal.SIGKILL, LOST]
    assert f"process 0 ({socket.gethostname()}) is gone" in running.said(1)
    assert start(training(path), 2).codes() == [0, 0]
    same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_does_not_answer(data, tmp_path, start, rank):
    path, run = recipe(data, tmp_path, steps=4000)
    running = start(training(path), 2)
    running.wait_for(lambda: at_step(run, 3))
    running.kill(signal.SIGSTOP, rank=rank)
    assert running[1 - rank].wait(TIMEOUT_MINUTES * 60 + 60) == LOST
    assert f"process {rank} ({socket.gethostname()}) does not answer" in running.said(1 - rank)
    running.kill(signal.SIGCONT, rank=rank)
    assert running[rank].wait(60) in (LOST, 1)


@pytest.mark.slow
def test_a_process_whose_data_does_not_come_is_named_with_its_stack(data, tmp_path, start):
    path, run = recipe(data, tmp_path, steps=4000)
    running = start(training(path, "data.workers=1", "train.save=sync"), 2)
    running.wait_for(lambda: at_step(run, 3))
    for worker in psutil.Process(running[1].pid).children():
        worker.suspend()
    assert running.codes() == [LOST, LOST]
    for rank in (0, 1):
        assert f"process 1 ({socket.gethostname()}) does not go on" in running.said(rank)
        assert re.search(r"not go on: \d+ s at step \d+, data, in ", running.said(rank))
    assert "next_step" in (run / "faults" / "process-0001.txt").read_text()


# The lifeline alone, without training: what happens to one process, and what each ends with.


def watched(what, folder, who=1):
    return [sys.executable, "-m", "tests.distributed.watched", what, str(folder), str(who)]


@pytest.mark.slow
def test_a_process_that_hangs_in_c_with_the_lock_held_leaves_its_stack(tmp_path, start):
    running = start(watched("lock", tmp_path), 2)
    assert running.codes() == [LOST, 1]
    assert re.search(r"process 1 .* does not (go on or )?answer.* step 7, forward", running.said(0))
    stack = (tmp_path / "process-0001.txt").read_text()
    assert "Timeout" in stack and "watched.py" in stack


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "who", "codes", "message"),
    [
        ("loop", 1, [LOST, LOST, LOST], "process 1 (HOST) does not go on"),
        ("loop", 0, [LOST, LOST, LOST], "process 0 (HOST) does not go on"),
        ("error", 1, [WRONG, WRONG, WRONG], "this disk is full"),
        ("error", 0, [WRONG, WRONG, WRONG], "this disk is full"),
        ("stop", 1, [REQUEUE, REQUEUE, REQUEUE], "SIGTERM"),
        ("crash", 1, [LOST, 1, LOST], "a bug"),
    ],
)
def test_what_happens_to_one_process_ends_all(tmp_path, start, what, who, codes, message):
    running = start(watched(what, tmp_path, who), 3)
    assert running.codes() == codes
    for rank in range(3):
        assert message.replace("HOST", socket.gethostname()) in running.said(rank)


@pytest.mark.slow
def test_long_work_of_the_main_process_is_waited_for(tmp_path, start):
    assert start(watched("alone", tmp_path), 2).codes() == [0, 0]
    assert not list(tmp_path.glob("process-*")), "an empty file of stacks is left"
