"""Two hosts (network namespaces) through launch/torchrun.sh: one process's run, whatever fails."""

from __future__ import annotations

import signal
import time

import pytest

from tests.distributed.hosts import ROOT, need, two_hosts, wait_until
from tests.distributed.tiny import same_curve, steps_made, tiny
from tests.end_to_end import small_run as small

pytestmark = pytest.mark.slow
AMONG = ["--nodes=2", "--rendezvous=node1:29400", "--hosts=node1,node2", "--id=run"]
LAUNCH = [str(ROOT / "launch" / "torchrun.sh"), *AMONG]


@pytest.fixture
def hosts(tmp_path):
    need()
    with two_hosts(tmp_path / "hosts") as both:
        yield both


def launch(hosts, path, *options):
    return [host.start(*LAUNCH, *options, "1", str(path)) for host in hosts]


def finish(hosts, launched, seconds=400):
    codes = [process.wait(timeout=seconds) for process in launched]
    assert codes == [0, 0], printed(hosts)


def printed(hosts):
    return "\n".join(f"== {host.name}\n{host.output()[-4000:]}" for host in hosts)


def make_steps(hosts, run, steps):
    wait_until(lambda: steps_made(run) >= steps, 200, lambda: printed(hosts))


@pytest.mark.parametrize("zero", [2, 3])
def test_two_hosts_make_the_run_of_one_process(data, one, hosts, tmp_path, zero):
    finish(hosts, launch(hosts, tiny(data, tmp_path / "run", zero)))
    same_curve(one, tmp_path / "run")


def test_a_host_that_is_lost_and_comes_back_goes_on(data, one, hosts, tmp_path):
    run = tmp_path / "run"
    path = tiny(data, run, 2)
    first, _ = launch(hosts, path, "--join-timeout=200")
    make_steps(hosts, run, 6)
    hosts[1].kill()
    assert not hosts[1].inside()
    again = hosts[1].start(*LAUNCH, "--join-timeout=200", "1", str(path))
    finish(hosts, [first, again])
    same_curve(one, run)
    assert [line["event"] for line in small.lines(run, "event")].count("resume") == 1


def test_a_link_that_is_cut_ends_both_hosts_and_the_next_start_goes_on(data, one, hosts, tmp_path):
    run, minutes, join = tmp_path / "run", 0.25, 60
    path = tiny(data, run, 2)
    overrides = [f"engine.timeout_minutes={minutes}"]
    options = ["--restarts=0", f"--join-timeout={join}", "1", str(path), *overrides]
    launched = [host.start(*LAUNCH, *options) for host in hosts]
    make_steps(hosts, run, 6)
    hosts[1].link("down")
    cut = time.monotonic()
    codes = [process.wait(timeout=240) for process in launched]
    assert codes == [76, 76], printed(hosts)
    assert time.monotonic() - cut < 60 * minutes + join + 120
    for host, other in zip(hosts, reversed(hosts), strict=True):
        assert other.name in host.output(), printed(hosts)
    assert steps_made(run) < 20
    hosts[1].link("up")
    finish(hosts, [host.start(*LAUNCH, "1", str(path)) for host in hosts])
    same_curve(one, run)


def test_where_fewer_hosts_are_allowed_the_run_goes_on_without_a_lost_one(data, one, hosts, tmp_path):
    run = tmp_path / "run"
    path = tiny(data, run, 2)
    options = ["--nodes=1:2", "--rendezvous=node1:29400", "--id=run", "1", str(path)]
    launched = [host.start(LAUNCH[0], *options) for host in hosts]
    make_steps(hosts, run, 6)
    hosts[1].kill()
    assert launched[0].wait(timeout=400) == 0, printed(hosts)
    same_curve(one, run)


def test_a_signal_to_one_launcher_saves_and_ends_both(data, one, hosts, tmp_path):
    run = tmp_path / "run"
    path = tiny(data, run, 3, save_every_steps=None)
    launched = launch(hosts, path)
    make_steps(hosts, run, 3)
    launched[1].send_signal(signal.SIGUSR1)
    codes = [process.wait(timeout=200) for process in launched]
    assert codes == [75, 75], printed(hosts)
    assert steps_made(run) < 20
    finish(hosts, launch(hosts, path))
    same_curve(one, run)


def test_a_name_that_does_not_resolve_and_a_host_that_is_not_there_are_said(hosts, tmp_path):
    options = ["--nodes=2", "--names-timeout=3", "--join-timeout=5", "1", "recipe.yaml"]
    script = LAUNCH[0]
    lost = hosts[0].start(script, "--rendezvous=node7:29400", *options)
    assert lost.wait(timeout=60) == 2
    assert "the name node7 does not resolve here" in hosts[0].output()
    silent = hosts[0].start(script, "--rendezvous=node2:29400", *options)
    assert silent.wait(timeout=60) == 76
    assert "no one listens at node2:29400 after 5 s" in hosts[0].output()
