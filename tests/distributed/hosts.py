"""Two hosts on one machine: network namespaces with own host names and hosts files, and SLURM on them.

As root on Debian, what is missing is installed once. Where a machine cannot, tests that ask are skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
"""{command: the Debian package that has it}"""
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/sbin:/sbin:{os.environ['PATH']}"


def need(*commands: str) -> None:
    """Skip the test unless this machine can have hosts of its own, with these commands."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    with Path(tempfile.gettempdir(), "lclm-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [name for name in ("ip", *commands) if not shutil.which(name, path=PATH)]
        if missing:
            _install(sorted({PACKAGES[name] for name in missing}))
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this machine allows no namespaces: {probe.stderr.strip()}")


def _install(packages: list[str]) -> None:
    if not shutil.which("apt-get"):
        pytest.skip(f"{', '.join(packages)} are missing, and there is no apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    for command in (["apt-get", "update"], install):
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{' '.join(command)} took too long")
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr[-300:]}")


def training(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of the processes that a launcher started to train, and that have not ended."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if "worker.py" in " ".join(process.cmdline()):
                found.append(process)
    return found


class Host:
    """A network namespace with a host name; what is started in it is ended with it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address, self.folder = f"node{number}", f"10.77.0.{number}", folder
        self.namespace = f"lclm-{os.getpid()}-{number}"
        self.processes: list[subprocess.Popen[str]] = []

    def command(self, *words: str) -> list[str]:
        """A command in this host. (`ip netns exec` would mount /sys anew; SLURM then misses its cgroup.)"""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "sh", "-c"]
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        return [*enter, script, "sh", self.name, str(self.folder / f"{self.name}.hosts"), *words]

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Begin a command; its output goes to a file, see `output`."""
        log = (self.folder / f"{self.name}-{len(self.processes)}.log").open("w")
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        inherited |= {"PATH": PATH, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        process = subprocess.Popen(
            self.command(*words),
            env=inherited | environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        log.close()
        self.processes.append(process)
        return process

    def run(self, *words: str, seconds: float = 60, **environment: str) -> str:
        """Run a command to its end; what it printed."""
        process = self.start(*words, **environment)
        code = process.wait(timeout=seconds)
        assert code == 0, f"{' '.join(words)}: {code}\n{self.output()}"
        return self.output()

    def output(self) -> str:
        """What the command that was begun last has printed."""
        return (self.folder / f"{self.name}-{len(self.processes) - 1}.log").read_text(errors="replace")

    def link(self, state: str) -> None:
        """Set the network "up" or "down"."""
        ip("-n", self.namespace, "link", "set", "eth0", state)

    def inside(self) -> list[psutil.Process]:
        """All processes of this host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, env={"PATH": PATH}
        )
        found = []
        for pid in listed.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def kill(self) -> None:
        """kill -9 for every process of this host."""
        until = time.monotonic() + 20
        while (left := self.inside()) and time.monotonic() < until:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
        for started in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(timeout=10)


LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_CONF",
    "GLOO_SOCKET_IFNAME",
)


def ip(*words: str) -> None:
    """The command of that name."""
    environment = os.environ | {"PATH": PATH}
    done = subprocess.run(["ip", *words], capture_output=True, text=True, env=environment, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """node1 and node2, which reach each other and nothing else. Nothing of them is left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    hosts = [Host(1, folder), Host(2, folder)]
    for host, other in zip(hosts, reversed(hosts), strict=True):  # as Debian writes it
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}", f"{other.address} {other.name}"]
        (folder / f"{host.name}.hosts").write_text("\n".join(lines) + "\n")
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
        one, two = (host.namespace for host in hosts)
        ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two)
        for host in hosts:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield hosts
    finally:
        for host in hosts:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                ip("netns", "del", host.namespace)


def wait_until(what: Callable[[], object], seconds: float, why: Callable[[], str] = str) -> None:
    """Wait until `what()` is true; fails with `why()` if it is not within so many seconds."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited {seconds} s in vain\n{why()}"
        time.sleep(0.1)


class Slurm:
    """A SLURM cluster of two hosts, its controller on the first."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        for name in ("munge", "run", "log", "state", "spool/node1", "spool/node2"):
            (folder / name).mkdir(parents=True)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} Port=17001 CPUs=2 SocketsPerBoard=1 "
            "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000"
            for host in hosts
        )
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, nodes=nodes))
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._start_munge(key)
        first = hosts[0]
        first.start("slurmctld", "-D", "-c", **self.environment)
        for host in hosts:
            host.start("slurmd", "-D", "-N", host.name, **self.environment)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%D %t") == "2 idle", 60, self.logs)

    def _start_munge(self, key: Path) -> None:
        files = {
            "socket": "munge.sock",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "seed",
        }
        options = [f"--{name}={self.folder / 'munge' / file}" for name, file in files.items()]
        self.hosts[0].start("munged", "--foreground", "--force", f"--key-file={key}", *options)
        wait_until((self.folder / "munge" / "munge.sock").exists, 30, self.hosts[0].output)

    def ask(self, *words: str) -> str:
        """Run one of SLURM's commands on the first host; what it printed, stripped."""
        command = self.hosts[0].command(*words)
        environment = os.environ | self.environment | {"PATH": PATH}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)
        return done.stdout.strip()

    def submit(self, *words: str, **environment: str) -> str:
        """sbatch; the job's number."""
        added = {"PROCESSES": "1", "LOGS": str(self.folder / "jobs"), "OMP_NUM_THREADS": "1"}
        added |= {"PYTHON": sys.executable, "PATH": PATH, **self.environment, **environment}
        done = subprocess.run(
            self.hosts[0].command("sbatch", "--parsable", f"--output={self.folder}/job-%j.log", *words),
            env={name: value for name, value in os.environ.items() if name not in LAUNCHERS} | added,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str, key: str = "JobState") -> str:
        """What SLURM says of a job: its state, as PENDING or COMPLETED, or another key."""
        words = self.ask("scontrol", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), "")

    def log(self, job: str, node: str | None = None) -> str:
        """What a job's script has printed, or its processes on a node."""
        file = self.folder / (f"jobs/{job}/{node}.log" if node else f"job-{job}.log")
        return file.read_text(errors="replace") if file.exists() else ""

    def restart_now(self, job: str) -> None:
        """End the time that SLURM holds a requeued job back."""
        wait_until(lambda: self.state(job) == "PENDING", 90, self.logs)
        time.sleep(5)  # a node takes what starts within the second of a requeue for what was revoked
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def logs(self) -> str:
        """The end of every log."""
        files = [*self.folder.glob("job-*"), *self.folder.glob("jobs/*/*"), *self.folder.glob("log/*")]
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


CONFIGURATION = """ClusterName=lab
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock
CredType=cred/munge
SlurmctldPort=16817
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
SlurmdTimeout=20
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
