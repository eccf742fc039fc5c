"""A process on a lifeline, without any training: it enters a phase, and what its argument says happens.

python -m tests.distributed.watched WHAT FOLDER [WHO]; WHAT happens to process WHO (1), the others wait.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lclm.train import ends
from lclm.train.lifeline import Lifeline
from lclm.train.processes import leave_processes, start_processes
from lclm.train.settings import EngineSettings


def work(what: str, lifeline: Lifeline, who: int) -> None:
    lifeline.at("forward", 7)
    if what == "alone":
        with lifeline.alone("probes"):
            if lifeline.rank == 0:
                time.sleep(15)
    elif lifeline.rank == who:
        print("now", flush=True)
        if what == "loop":
            while True:
                time.sleep(0.01)
        elif what == "lock":  # a function of C called with the interpreter's lock held
            time.sleep(1.5)
            ctypes.PyDLL(None).sleep(1000)
        elif what == "error":
            raise ValueError("this disk is full")
        elif what == "crash":
            raise AssertionError("a bug")
        elif what == "stop":
            raise ends.Requeue("SIGTERM")
        elif what == "wait":
            time.sleep(1000)
    dist.all_reduce(torch.ones(3))


def main() -> None:
    what, folder, who = sys.argv[1], Path(sys.argv[2]), int((sys.argv[3:] or [1])[0])
    settings = EngineSettings(timeout_minutes=0.2, alone_minutes=0.5)
    processes = start_processes(settings)
    lifeline = Lifeline(processes.rank, processes.size, settings)
    lifeline.write_to(folder)
    try:
        with lifeline:
            work(what, lifeline, who)
        leave_processes()
    except (ends.Requeue, ends.Lost, ValueError) as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        codes = {ends.Requeue: ends.REQUEUE, ends.Lost: ends.LOST}
        ends.end(codes.get(type(error), ends.WRONG))


if __name__ == "__main__":
    main()
