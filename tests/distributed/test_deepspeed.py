"""Two hosts with ssh between them through launch/deepspeed.sh: one process's run, and exit codes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.distributed.hosts import PATH, need, two_hosts, wait_until
from tests.distributed.tiny import same_curve, tiny

pytestmark = pytest.mark.slow
SCRIPT = "launch/deepspeed.sh"
SSHD = """Port 22
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
UsePAM no
PidFile none
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two hosts on which ssh needs no password."""
    need("sshd", "ssh", "pdsh")
    folder = tmp_path_factory.mktemp("ssh")
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", folder / "key"], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    options = f"-F none -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q"
    (folder / "ssh").write_text(f'#!/bin/sh\nPATH={PATH}\nexec ssh {options} "$@"\n')
    (folder / "ssh").chmod(0o755)
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    separation = Path("/run/sshd")
    made = not separation.exists()
    separation.mkdir(exist_ok=True)
    try:
        with two_hosts(folder / "hosts") as both:
            for host in both:
                host.start("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"))
            environment = {"PATH": f"{folder}:{PATH}", "HOME": str(folder), "RESTARTS": "0"}
            wait_until(lambda: answers(both[0], environment), 30, both[1].output)
            yield both[0], environment, str(folder / "hostfile")
    finally:
        if made:
            separation.rmdir()


def answers(host, environment):
    return host.start("ssh", "node2", "true", **environment).wait(timeout=20) == 0


def test_two_hosts_make_the_run_of_one_process(data, one, hosts, tmp_path):
    host, environment, hostfile = hosts
    run = tmp_path / "run"
    process = host.start(SCRIPT, hostfile, str(tiny(data, run, 2)), **environment)
    assert process.wait(timeout=300) == 0, host.output()[-6000:]
    same_curve(one, run)


def test_a_stopped_run_and_an_error_of_the_user_come_out_as_codes(data, hosts, tmp_path):
    host, environment, hostfile = hosts
    path = str(tiny(data, tmp_path / "run", 2))
    for word, code in (("train.stop_after_steps=2", 75), ("train.no_such_key=2", 2)):
        process = host.start(SCRIPT, hostfile, path, word, **environment)
        assert process.wait(timeout=300) == code, host.output()[-6000:]
