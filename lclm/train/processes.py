"""The processes of a run: joining those that a launcher started, talking to them, leaving them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lclm.train.settings import EngineSettings

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `size`, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

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


def start_processes(settings: EngineSettings) -> Processes:
    """Join the processes that torchrun (or another launcher) started; alone without its environment."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=settings.timeout_minutes)
        backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return Processes(rank, size, device)


def leave_processes() -> None:
    """End the process groups; the last thing a process does.

    Left to the interpreter's end, gloo's threads now and then abort a process that has done all its work.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def end_with_launcher() -> None:
    """Let this process be killed when torchrun is: killed, torchrun cannot end its processes, and they would
    go on beside those of the next start. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
