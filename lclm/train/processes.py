"""The processes of a run: joining those that a launcher started, talking to them, leaving them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lclm.train import ends
from lclm.train.settings import EngineSettings

if TYPE_CHECKING:
    from lclm.train.lifeline import Lifeline


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `size`, the device that it computes on, what it is watched by."""

    rank: int
    size: int
    device: torch.device
    lifeline: Lifeline | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def at(self, phase: str, step: int | None = None, *, long: bool = False) -> None:
        """Tell the others that this process enters a phase (of a step, where one is given)."""
        if self.lifeline is not None:
            self.lifeline.at(phase, step, long=long)

    def write_faults_to(self, folder: Path) -> None:
        """Stacks of a process that does not go on are written there."""
        if self.lifeline is not None:
            self.lifeline.write_to(folder)

    @contextlib.contextmanager
    def alone(self, phase: str) -> Iterator[None]:
        """Around long work of the main process only; the others wait as long as it is alive. Collective."""
        if self.lifeline is not None:
            with self.lifeline.alone(phase):
                yield
        else:
            yield
            self.barrier()

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on every process."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: str | None) -> None:
        """Raise ValueError on every process if any process has an error message."""
        if self.size == 1:
            errors = [error]
        else:
            errors = self.gather(error)
        found = [message for message in errors if message]
        if found:
            raise ValueError(found[0])


LEAVE_SECONDS = 60.0
LIFELINE_FIRST = timedelta(seconds=30)
"""What a collective waits for longer than `engine.timeout_minutes`: the lifeline names who is missing."""


def start_processes(settings: EngineSettings) -> Processes:
    """Join the processes that torchrun (or another launcher) started; alone without its environment."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    ends.end_with_launcher()
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=settings.timeout_minutes) + LIFELINE_FIRST
        backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return Processes(rank, size, device)


def leave_processes() -> None:
    """End the process groups; the last thing that a process does which has done all its work.

    Left to the interpreter's end, gloo's threads now and then abort it. Should another process be gone by
    now, so that they cannot be ended, this one still ends well.
    """
    if dist.is_initialized():
        unable = threading.Timer(LEAVE_SECONDS, ends.end, [ends.COMPLETE], {"at_once": True})
        unable.daemon = True
        unable.start()
        dist.destroy_process_group()
        unable.cancel()
