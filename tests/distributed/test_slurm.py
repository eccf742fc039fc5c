"""Two nodes of a real SLURM through launch/slurm.sbatch: one process's run, requeued or not."""

from __future__ import annotations

import pytest

from tests.distributed.hosts import Slurm, need, training, two_hosts, wait_until
from tests.distributed.tiny import same_curve, steps_made, tiny
from tests.end_to_end import small_run as small

pytestmark = pytest.mark.slow
SCRIPT = "launch/slurm.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    need("slurmctld", "slurmd", "sbatch", "munged")
    folder = tmp_path_factory.mktemp("slurm")
    with two_hosts(folder / "hosts") as hosts:
        yield Slurm(hosts, folder / "slurm")


def complete(slurm, job):
    wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), 400, slurm.logs)
    assert slurm.state(job) == "COMPLETED", slurm.logs()


def events(run):
    return [line["event"] for line in small.lines(run, "event")]


def test_a_requeued_job_goes_on_to_the_run_of_one_process(data, one, slurm, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit("--nodes=2", SCRIPT, str(tiny(data, run, 2)))
    wait_until(lambda: steps_made(run) >= 6, 200, slurm.logs)
    slurm.ask("scontrol", "requeue", job)
    slurm.restart_now(job)
    complete(slurm, job)
    same_curve(one, run)
    assert events(run).count("resume") == 1
    assert slurm.log(job, "node1")
    assert slurm.log(job, "node2")


def test_before_its_time_limit_a_job_saves_and_goes_back_into_the_queue(data, one, slurm, tmp_path):
    run = tmp_path / "run"
    path = tiny(data, run, 3, save_every_steps=None, stop_before_limit_minutes=0.0)
    words = ["engine.timeout_minutes=30"]
    job = slurm.submit("--nodes=2", "--time=30", "--signal=USR1@120", SCRIPT, str(path), *words)
    wait_until(lambda: steps_made(run) >= 3, 200, slurm.logs)
    # all wait for a process that is stopped, until the limit is near
    (process,) = training(slurm.hosts[1].inside())
    process.suspend()
    minutes = int(slurm.state(job, "RunTime").split(":")[1]) + 2
    slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    try:
        wait_until(lambda: "SIGUSR1" in slurm.log(job, "node1"), 120, slurm.logs)
    finally:
        process.resume()
    wait_until(lambda: slurm.state(job) == "PENDING", 120, slurm.logs)
    assert "restart 0: exit code 75" in slurm.log(job)
    saved = steps_made(run)
    assert 3 <= saved < 20
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    slurm.restart_now(job)
    complete(slurm, job)
    same_curve(one, run)
    (resumed,) = [line for line in small.lines(run, "event") if line["event"] == "resume"]
    assert resumed["step"] == saved


def test_a_recipe_that_is_wrong_is_not_started_again(slurm, tmp_path):
    job = slurm.submit("--nodes=2", SCRIPT, str(tmp_path / "none.yaml"))
    wait_until(lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 200, slurm.logs)
    assert slurm.state(job) == "FAILED"
    assert "restart 0: exit code 2" in slurm.log(job)
