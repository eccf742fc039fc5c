"""`lclm doctor`: everything that can be tried before a run is started, on the machines that will run it."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from lclm.train.lifeline import host_name
from lclm.train.planning.hardware import GIB, MACHINES, Machine
from lclm.train.preflight import Checked, check, name
from lclm.train.processes import Processes

BUCKET_BYTES = {"cuda": 2**28, "cpu": 2**24}
"""Bytes that the all-reduce is timed with, at most."""
ROUNDS = 5


def doctor(recipe: Any, processes: Processes) -> Checked:
    """Check, time and try. Collective. The largest batch is tried where nothing else is wrong."""
    checked = check(recipe, processes)
    if processes.size > 1:
        checked.problems += all_reduce(recipe, processes, checked.figures)
    checked.problems += _lanes(recipe, processes.size)
    if not checked.problems:
        checked.problems += host_memory(recipe, processes, checked.figures)
    if not checked.problems:
        checked.problems += try_largest(recipe, processes, checked.figures)
    return checked


def all_reduce(recipe: Any, processes: Processes, figures: dict[str, str]) -> list[str]:
    """Whether a bucket is summed over all processes, and how fast. Collective."""
    size = min(4 * recipe.engine.bucket_elements, BUCKET_BYTES[processes.device.type])
    bucket = torch.empty(size // 4, device=processes.device)
    seconds, wrong = [], 0
    for _ in range(ROUNDS):
        bucket.fill_(processes.rank + 1)
        processes.barrier()
        started = time.perf_counter()
        dist.all_reduce(bucket)
        total = float(bucket[-1])  # waits for the device
        seconds.append(time.perf_counter() - started)
        wrong += total != processes.size * (processes.size + 1) / 2
    best = min(seconds[1:])
    sent = 2 * (processes.size - 1) / processes.size * size
    gathered = processes.gather((host_name(), wrong, best))
    figures["all-reduce"] = (
        f"{size / 2**20:.0f} MiB in {max(t for _, _, t in gathered) * 1e3:.1f} ms: "
        f"{sent / max(t for _, _, t in gathered) / 1e9:.2f} GB/s of each process"
    )
    hosts = [host for host, _, _ in gathered]
    return [
        f"{name(rank, hosts)}: an all-reduce gave a wrong sum; test this machine's network and memory"
        for rank, (_, bad, _) in enumerate(gathered)
        if bad
    ]


def _lanes(recipe: Any, size: int) -> list[str]:
    try:
        recipe.data.validate_world(size)
    except ValueError as error:
        return [str(error)]
    return []


def host_memory(recipe: Any, processes: Processes, figures: dict[str, str]) -> list[str]:
    """Whether every host can hold the models that its processes build in fp32 at first. Collective."""
    from lclm.train.planning.plan import Cluster, Planner

    needed = 4.0 * sum(Planner(recipe, Cluster(MACHINES["cpu"])).counts.values())
    found = processes.gather((host_name(), available_memory()))
    hosts = [host for host, _ in found]
    problems = []
    for host in dict.fromkeys(hosts):
        free, count = min(free for at, free in found if at == host), hosts.count(host)
        if free < needed * count:
            problems.append(
                f"{host}: {free / GIB:.1f} GiB of memory are free, but {count} processes build a model of "
                f"{needed / GIB:.1f} GiB each; end other programs, or start fewer processes there"
            )
    least = min(free for _, free in found)
    figures["host memory"] = f"{least / GIB:.1f} GiB free, {needed / GIB:.1f} GiB a process to begin with"
    return problems


def available_memory() -> float:
    """Bytes of the host's memory that can be had; infinite where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return float("inf")
    return float(lines["MemAvailable"].split()[0]) * 1024


def try_largest(recipe: Any, processes: Processes, figures: dict[str, str]) -> list[str]:
    """Forward, backward and update on the largest batch, with an engine that is thrown away. Collective.

    Of the stage that takes the most memory by plan, from the run's start. Raises ValueError on a process that
    runs out of memory: it cannot tell the others, which wait for it; the launcher ends them.
    """
    from lclm.train.metrics import memory_gib
    from lclm.train.planning.largest import largest_batch
    from lclm.train.planning.plan import Cluster, Planner
    from lclm.train.stages import build_engine

    stage = ""
    planner = None
    if processes.main:
        planner = Planner(recipe, Cluster(this_machine(processes.device), per_node=processes.size))
        stage = max(recipe.stages, key=lambda one: planner.memory(one).total)
    stage = processes.gather(stage)[0]
    settings = recipe.stage_data(stage)
    try:
        engine, _ = build_engine(recipe, recipe.stages[stage], None, processes)
        batch = largest_batch(engine.model.config, settings.pack, settings.micro_batch, processes.device)
        started = time.perf_counter()
        for _ in range(settings.accumulation(processes.size)):
            output = engine.deepspeed(**batch)
            engine.deepspeed.backward(output.loss)
            engine.deepspeed.step()
        finite = bool(torch.isfinite(output.loss))
        seconds = time.perf_counter() - started
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ValueError(too_large(recipe, stage, processes)) from None
    figures["largest batch"] = (
        f"stage {stage}: a step in {seconds:.2f} s, {memory_gib(processes.device):.2f} GiB at the peak"
    )
    engine.close()
    return [] if finite else [f"stage {stage}: the loss of a batch of zeros is not finite; check the weights"]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is the allocator's."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def this_machine(device: torch.device) -> Machine:
    """The machine for plans about a device that is here."""
    if device.type != "cuda":
        known = MACHINES["cpu"]
        return Machine(known.name, available_memory(), known.bf16, known.fp32, known.link, cuda=False)
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    h100 = MACHINES["h100"]
    return Machine(torch.cuda.get_device_name(device), memory, h100.bf16, h100.fp32, h100.link)


def too_large(recipe: Any, stage: str, processes: Processes) -> str:
    """What to say, and to change, where a step does not fit."""
    from lclm.train.planning.plan import Cluster, Planner
    from lclm.train.planning.proposals import propose

    machine = this_machine(processes.device)
    planner = Planner(recipe, Cluster(machine, per_node=processes.size))
    planned = planner.memory(stage)
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in planned.parts.items())
    proposal = propose(planner, stage)
    advice = f"set {' '.join(proposal.settings)}" if proposal.fits else "use more or larger GPUs"
    return (
        f"process {processes.rank} ({host_name()}): stage {stage} does not fit into the "
        f"{machine.memory / GIB:.1f} GiB of {machine.name}: by plan it takes {planned.total / GIB:.1f} GiB "
        f"({parts}); {advice}"
    )
