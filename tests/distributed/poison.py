"""Run by torchrun: one process's gradients are poisoned; all leave out the step and change nothing."""

from __future__ import annotations

import torch.distributed as dist

from lclm.train.processes import leave_processes
from tests.train.toy import ALL, make, same, state_of, step


def main() -> None:
    """Every ZeRO stage and precision, then Muon's stop message."""
    for zero, precision in ALL:
        engine, guard = make(zero, precision)
        rank = dist.get_rank()
        for seed in range(2):
            assert not step(engine, guard, seed * 10 + rank)
        before = state_of(engine)
        bad = [0] if rank == 1 else []
        assert step(engine, guard, 3, poison_gradient=float("nan") if bad else None)
        assert step(engine, guard, 4, poison_gradient=float("inf") if bad else None)
        assert same(before, state_of(engine)), (zero, precision)
        try:
            step(engine, guard, 5, poison_gradient=float("nan") if bad else None)
        except ValueError as error:
            assert str(error).count("some-key") == 2
        else:
            raise AssertionError("three steps in a row should stop the run")
        engine.close()
    print(f"process {rank}: nothing changed")
    leave_processes()


if __name__ == "__main__":
    main()
