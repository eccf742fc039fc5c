"""Before the first step: do all processes run the same thing, and have their machines what it takes.

What every process finds is gathered and compared on all of them, so that all stop together, and what differs
is named with its process and host.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lclm.train.lifeline import host_name
from lclm.train.processes import Processes

LIBRARIES = (
    *("torch", "transformers", "deepspeed", "tokenizers", "safetensors", "numpy", "peft", "fsspec"),
    *("liger-kernel", "flash-attn"),
)
"""Libraries that must be the same on every process."""
VARIABLES = ("NCCL_", "CUBLAS_", "PYTORCH_", "TORCH_NCCL_")
"""Beginnings of environment variables that must be the same, but for names of devices."""
OF_A_HOST = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE")
MOST_SKEW = 5.0
"""Seconds by which the hosts' clocks may differ."""
LEAST_FILES = 1024
"""Files that a process must be able to hold open."""
LEAST_SHM = 64 * 2**20
"""Bytes of shared memory that background processes need."""
LEAST_FREE = 0.9
"""Share of a GPU's memory that must be free before a run."""


@dataclass
class Checked:
    """What a check found: problems, which stop the run, and figures to show."""

    problems: list[str] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)


def preflight(recipe: Any, processes: Processes) -> Checked:
    """All that is quick to check. Collective. Raises ValueError, on all processes, listing every problem."""
    checked = check(recipe, processes)
    if checked.problems:
        raise ValueError("\n".join([*checked.problems, *_way_out(processes)]))
    return checked


def _way_out(processes: Processes) -> list[str]:
    return ["`lclm doctor RECIPE` checks again; train.preflight=false trains in spite of it"]


def check(recipe: Any, processes: Processes) -> Checked:
    """What `preflight` raises about, as a list. Collective."""
    found = processes.gather((host_name(), facts(recipe), own_problems(recipe, processes)))
    hosts = [host for host, _, _ in found]
    checked = Checked(differences([own for _, own, _ in found], hosts))
    for rank, (_, _, problems) in enumerate(found):
        checked.problems += [f"{name(rank, hosts)}: {problem}" for problem in problems]
    checked.problems += _recipe_lines(recipe, processes, [own for _, own, _ in found], hosts)
    checked.problems += _clocks(processes, hosts, checked.figures)
    checked.problems += processes.gather(_disk(recipe, checked.figures) if processes.main else [])[0]
    checked.figures |= {"processes": f"{processes.size} on {len(set(hosts))} hosts"}
    return checked


def name(rank: int, hosts: Sequence[str]) -> str:
    """A process with its host."""
    return f"process {rank} ({hosts[rank]})"


def facts(recipe: Any) -> dict[str, str]:
    """What must be equal on all processes, as {what: value}."""
    known = {
        "Python": platform.python_version(),
        "the code of lclm": code_version(),
        "recipe": digest(recipe),
    }
    for library in LIBRARIES:
        known[library] = _version(library)
    known |= {
        f"environment variable {key}": value
        for key, value in os.environ.items()
        if key.startswith(VARIABLES) and key not in OF_A_HOST
    }
    if torch.cuda.is_available():
        known["GPU"] = torch.cuda.get_device_name()
        known["CUDA"] = str(torch.version.cuda)
        known["driver"] = _nvidia("driver_version")
    return known | _fingerprints(recipe)


def _version(library: str) -> str:
    """Of what was imported, or else of what is installed."""
    module = sys.modules.get(library)
    try:
        return str(getattr(module, "__version__", None) or version(library))
    except PackageNotFoundError:
        return "absent"


def code_version() -> str:
    """The commit, where there is one, and a hash of all files of the package."""
    from lclm.checkpoint import commit

    package = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return f"{(commit() or 'no commit')[:12]} with files {total.hexdigest()[:12]}"


def digest(recipe: Any) -> str:
    """A hash of the resolved recipe."""
    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:12]


def _fingerprints(recipe: Any) -> dict[str, str]:
    from lclm.data.shards import DataSet

    found = {}
    for group in ("sources", "heldout"):
        for key, source in getattr(recipe.data, group).items():
            try:
                value = DataSet.open(source.path).fingerprint
            except (ValueError, OSError) as error:
                value = f"cannot be read ({str(error).splitlines()[0]})"
            found[f"data.{group}.{key}"] = value
    return found


def differences(all_facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """A sentence for every process and thing that is not as on most processes (at a tie, as on the first)."""
    problems = []
    for what in dict.fromkeys(what for own in all_facts for what in own):
        values = [own.get(what, "not set") for own in all_facts]
        counts = Counter(values)
        most = max(counts, key=lambda value: counts[value])  # of equals, the first that appears
        for rank, value in enumerate(values):
            if value != most:
                others = "the others" if len(values) > 2 else name(values.index(most), hosts)
                problems.append(f"{name(rank, hosts)}: {what} {value}, {others} {most}")
    return problems


def _recipe_lines(
    recipe: Any, processes: Processes, all_facts: Sequence[Mapping[str, str]], hosts: Sequence[str]
) -> list[str]:
    """Which settings differ, where recipes do. Collective then."""
    if len({own["recipe"] for own in all_facts}) == 1:
        return []
    recipes = [_flat(plain) for plain in processes.gather(recipe.to_dict())]
    return differences(recipes, hosts)


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        parts = [_flat(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    return {path: repr(value)}


def own_problems(recipe: Any, processes: Processes) -> list[str]:
    """What this process's machine lacks."""
    problems = _limits(recipe)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        problems += _gpu(processes, local)
    data = _fingerprints(recipe)
    return problems + [f"{what} {value}" for what, value in data.items() if value.startswith("cannot")]


def _limits(recipe: Any) -> list[str]:
    import resource

    problems = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES:
        problems.append(
            f"only {soft} files may be open at once (`ulimit -n`, at most {hard}); allow {LEAST_FILES}"
        )
    shared = Path("/dev/shm")
    if recipe.data.workers and shared.is_dir() and (free := shutil.disk_usage(shared).free) < LEAST_SHM:
        problems.append(
            f"/dev/shm has {free / 2**20:.0f} MiB free, which background processes share batches through; "
            f"give it {LEAST_SHM / 2**20:.0f} MiB or more (containers: --shm-size), or set data.workers=0"
        )
    return problems


def _gpu(processes: Processes, local: int) -> list[str]:
    problems = []
    count = torch.cuda.device_count()
    if count < local:
        problems.append(f"{count} GPUs for {local} processes of this host; start one process per GPU")
    free, total = torch.cuda.mem_get_info(processes.device)
    if free < LEAST_FREE * total:
        problems.append(
            f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU {processes.device.index} are "
            "taken already; end what holds them (`nvidia-smi`)"
        )
    errors = _nvidia("ecc.errors.uncorrected.volatile.total")
    if errors.isdigit() and int(errors) > 0:
        problems.append(
            f"GPU {processes.device.index} has {errors} uncorrected ECC errors; leave the node out"
        )
    return problems


def _nvidia(what: str) -> str:
    """A figure of this process's GPU from nvidia-smi; "unknown" where it cannot say."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    index = os.environ.get("LOCAL_RANK", "0")
    try:
        done = subprocess.run([*command, "-i", index], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _clocks(processes: Processes, hosts: Sequence[str], figures: dict[str, str]) -> list[str]:
    """Hosts whose clocks are far from the others'. Collective."""
    processes.barrier()
    times = processes.gather(time.time())
    middle = statistics.median(times)
    figures["clocks"] = f"{max(times) - min(times):.2f} s apart at most"
    return [
        f"{name(rank, hosts)}: its clock is {value - middle:+.1f} s off the others'; run NTP or chrony there"
        for rank, value in enumerate(times)
        if abs(value - middle) > MOST_SKEW
    ]


def _disk(recipe: Any, figures: dict[str, str]) -> list[str]:
    """Whether the run's folder has room for its checkpoints and exports, less what it holds already."""
    from lclm.train.planning.plan import needed_disk

    folder = Path(recipe.run_dir).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        needed = needed_disk(recipe, int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        return [f"the model cannot be laid out: {error}"]
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free
    figures["disk"] = f"{free / 2**30:.1f} GiB free, {max(0.0, needed - held) / 2**30:.1f} GiB needed"
    if free >= needed - held:
        return []
    return [
        f"{folder}: {free / 2**30:.1f} GiB are free, but checkpoints and exports will take "
        f"{needed / 2**30:.1f} GiB ({held / 2**30:.1f} are there); free some, lower train.keep, or change "
        "run_dir"
    ]
