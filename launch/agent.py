"""torchrun for `lclm train`: names checked first, signals passed on, every wait bounded, exit codes kept.

Exit codes: 0 complete; 2 an error that a restart does not help; 75 saved, start me again; 76 a process or a
machine was lost, start me again; 130 interrupted by Ctrl-C; anything else: a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

USER, SAVED, LOST, INTERRUPTED = 2, 75, 76, 130
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 20.0
"""Seconds on top of --join-timeout that this machine may be without a process."""
STUCK = 30.0
"""Seconds after which torchrun, which looks for ended processes ten times a second, hangs if it did not."""


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line. One that is wrong ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="launch/torchrun.sh",
        description="Train a recipe with N processes on each machine, or go on with it.",
        epilog="Exit codes: 0 complete; 2 an error that a restart does not help; 75 saved, start me again; "
        "76 a process or machine was lost, start me again; 130 Ctrl-C; anything else: a crash. "
        "Pages: docs/scaling.md, docs/faults.md.",
    )
    add = parser.add_argument
    add(
        "processes",
        metavar="N",
        type=positive,
        help="processes on this machine: its GPUs, or on CPU its cores",
    )
    add("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="settings to change")
    add("--nodes", type=machines, default="1", help="number of machines, or LEAST:MOST (1)")
    add(
        "--rendezvous",
        metavar="HOST[:PORT]",
        type=door,
        help="where machines meet: the first one's name, port 29400",
    )
    add("--hosts", metavar="NAMES", default="", help="all machines' names, by commas: must resolve on each")
    add("--local-address", metavar="NAME", help="this machine, as the others know it (its host name)")
    add("--doctor", action="store_true", help="run `lclm doctor` in place of `lclm train`: a preflight")
    add("--id", metavar="NAME", help="the same on all machines of a run (the recipe's name)")
    add(
        "--restarts",
        type=int,
        default=3,
        help="restart processes on all machines so often, if one is lost (3)",
    )
    add("--join-timeout", type=positive, default=600, help="seconds that machines wait for each other (600)")
    add("--names-timeout", type=positive, default=60, help="seconds until all names must resolve (60)")
    add(
        "--again-code",
        type=positive,
        help="exit with this in place of 75 and 76, for schedulers that need it",
    )
    options = parser.parse_args(words)
    if options.nodes != "1" and not options.rendezvous:
        parser.error("--nodes above 1 needs --rendezvous HOST[:PORT], the same on all machines")
    if options.nodes == "1" and options.rendezvous:
        parser.error("--rendezvous is for several machines: give --nodes too, or leave it out")
    return options


def machines(text: str) -> str:
    """A number of machines, or LEAST:MOST."""
    counts = [positive(part) for part in text.split(":")]
    if len(counts) > 2 or counts != sorted(counts):
        raise ValueError
    return text


def door(text: str) -> str:
    """HOST:PORT of HOST or HOST:PORT."""
    host, _, port = text.partition(":")
    return f"{host}:{positive(port or '29400')}"


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def say(text: str) -> None:
    """A line on standard error."""
    print(f"launch/torchrun.sh ({socket.gethostname()}): {text}", file=sys.stderr, flush=True)


class GivenUp(Exception):
    """Nothing was started: the exit code, and why."""


class Keeper(threading.Thread):
    """Passes signals on to this machine's processes, and ends the program when it waits for too long.

    A signal goes to each process once, as soon as that process handles it: one that is still starting is not
    killed by a request to save.
    """

    def __init__(self, codes: Path, options: argparse.Namespace) -> None:
        super().__init__(daemon=True)
        self.codes, self.options, self.patience = codes, options, options.join_timeout + GRACE
        self.asked: list[tuple[int, set[int]]] = []
        self.seen = time.monotonic()
        for number in PASSED_ON:
            signal.signal(number, lambda signum, frame: self.asked.append((signum, set())))

    def run(self) -> None:
        import psutil

        me, heeded = psutil.Process(), time.monotonic()
        while True:
            time.sleep(0.2)
            all_children = me.children()
            children = [child.pid for child in all_children if lives(child)]
            if children:
                self.seen = time.monotonic()
            if children or not all_children:
                heeded = time.monotonic()
            for number, told in self.asked:
                for pid in set(children) - told:
                    if handles(pid, number):
                        told.add(pid)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, number)
            alone = time.monotonic() - self.seen
            if time.monotonic() - heeded > STUCK:
                self.end(f"its processes ended {STUCK:.0f} s ago, and torchrun hangs in the network", LOST)
            if self.asked and alone > 5 and not any(self.codes.iterdir()):
                self.end("stopped while it had no processes", SAVED)
            if alone > self.patience:
                self.end(f"no process here for {alone:.0f} s: other machines are gone or out of reach", LOST)

    def end(self, why: str, otherwise: int) -> None:
        """End the program, whatever its main thread waits for."""
        say(why)
        code = outcome(self.codes, [], otherwise)
        shutil.rmtree(self.codes, ignore_errors=True)
        os._exit(to_exit_with(code, self.options))


def lives(child: Any) -> bool:
    """Whether a child process has not ended."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return child.status() != psutil.STATUS_ZOMBIE
    return False


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal; where that cannot be known, yes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), -1)
    return bool(caught >> (number - 1) & 1)


def outcome(codes: Path, failed: list[int], otherwise: int) -> int:
    """The exit code for what this machine's processes ended with: those left in `codes`, and the failed ones.

    A process that was killed was lost, like one that says that it lost another.
    """
    final = [int(path.read_text() or USER) for path in codes.iterdir()]
    lost = (LOST, -signal.SIGKILL, -signal.SIGTERM)
    crashed = [code if code > 0 else 128 - code for code in failed if code not in lost]
    for code in (USER, INTERRUPTED):
        if code in final:
            return code
    if crashed or failed:
        return crashed[0] if crashed else LOST
    if SAVED in final:
        return SAVED
    return 0 if final else otherwise


def to_exit_with(code: int, options: argparse.Namespace) -> int:
    """The exit code, or the one that the scheduler takes for "start me again"."""
    return options.again_code if options.again_code and code in (SAVED, LOST) else code


def resolve(names: list[str], seconds: float) -> None:
    """Wait until all names have addresses; GivenUp with exit code 2 if one has none in time."""
    until = time.monotonic() + seconds
    for name in names:
        while True:
            try:
                socket.getaddrinfo(name, None)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise GivenUp(
                        USER,
                        f"the name {name} does not resolve here ({error.strerror}, tried for {seconds:g} s); "
                        "correct it, or add it to DNS or /etc/hosts of this machine",
                    ) from None
                time.sleep(min(1.0, seconds / 10))


def is_here(host: str) -> bool:
    """Whether a name is this machine's: its address can be bound."""
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def interface_towards(names: list[str]) -> str | None:
    """The network interface that leads to the first of the machines that is not reached through loopback.

    gloo takes the one of the machine's own name, which Debian's hosts file calls 127.0.1.1.
    """
    import psutil

    for name in names:
        family, _, _, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect(address)
            own = probe.getsockname()[0]
            for interface, addresses in psutil.net_if_addrs().items():
                if any(one.address == own for one in addresses) and not interface.startswith("lo"):
                    return interface
    return None


def wait_for_door(host: str, port: int, seconds: float, keeper: Keeper) -> None:
    """Wait until the first machine listens; GivenUp with exit code 76 if it does not in time."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if keeper.asked:
                raise GivenUp(SAVED, "stopped while it had no processes") from None
            if time.monotonic() > until:
                raise GivenUp(
                    LOST,
                    f"no one listens at {host}:{port} after {seconds:g} s ({error}): is launch/torchrun.sh "
                    "running on that machine, and the port open between the two?",
                ) from None
            time.sleep(1)


def launcher(options: argparse.Namespace, keeper: Keeper) -> list[str]:
    """torchrun's own options."""
    command = ["--nproc-per-node", str(options.processes), "--max-restarts", str(options.restarts)]
    command += ["--signals-to-handle", "SIGHUP,SIGQUIT"]
    if options.nodes == "1":
        return [*command, "--standalone"]
    if own := options.local_address or os.environ.get("SLURMD_NODENAME"):
        command += ["--local-addr", own]
    host, _, port = options.rendezvous.partition(":")
    names = [host, *filter(None, options.hosts.split(","))]
    resolve(names, options.names_timeout)
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_towards(names)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    here = is_here(host)
    if not here:
        wait_for_door(host, int(port), options.join_timeout, keeper)
    conf = f"join_timeout={options.join_timeout},is_host={str(here).lower()}"
    command += ["--nnodes", options.nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}"]
    return [*command, "--rdzv-id", options.id or Path(options.recipe).stem, "--rdzv-conf", conf]


def main() -> int:
    """Launch, wait, and say with which code to exit."""
    options = arguments()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // options.processes)))
    # each start of processes meets at a store of its own: a machine that comes back can join
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="lclm-codes-") as folder:
        codes = Path(folder)
        os.environ["LAUNCH_CODES"] = folder
        keeper = Keeper(codes, options)
        keeper.start()
        worker = str(Path(__file__).with_name("worker.py"))
        try:
            command = launcher(options, keeper)
            keeper.seen = time.monotonic()
            verb = "doctor" if options.doctor else "train"
            code = torchrun([*command, worker, verb, options.recipe, *options.overrides], codes)
        except GivenUp as end:
            code, why = end.args
            say(why)
    return to_exit_with(code, options)


def torchrun(command: list[str], codes: Path) -> int:
    """Run torchrun without its tracebacks: processes that fail have said why themselves."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as run

    failed: list[int] = []
    try:
        run(command)
    except ChildFailedError as error:
        failed = [failure.exitcode for failure in error.failures.values()]
    except (RendezvousError, dist.DistError) as error:
        say(f"the machines did not meet, or lost each other: {str(error) or type(error).__name__}")
        return outcome(codes, [], LOST)
    return outcome(codes, failed, LOST)


if __name__ == "__main__":
    sys.exit(main())
