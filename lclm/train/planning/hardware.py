"""The accelerators that a plan can be made for. Figures are those of public data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 2.0**30


@dataclass(frozen=True)
class Machine:
    """One accelerator (or the share of a CPU that one process has).

    memory: bytes. bf16, fp32: dense peak FLOP/s. link: bytes a second to its neighbours in the same node.
    reserve: bytes that driver, kernels and communication library take. spare: share of memory that the
    allocator cannot fill, because free pieces do not fit what is asked for.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    link: float
    reserve: float = 2.5 * GIB
    spare: float = 0.05
    cuda: bool = True

    @property
    def usable(self) -> float:
        """Bytes that a training step may use."""
        return (self.memory - self.reserve) * (1 - self.spare)

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision of the recipe."""
        return self.bf16 if precision == "bf16" else self.fp32


MACHINES = {
    "h100": Machine("NVIDIA H100 SXM", 79.1 * GIB, 989e12, 67e12, 450e9),
    "h200": Machine("NVIDIA H200 SXM", 139.8 * GIB, 989e12, 67e12, 450e9),
    "a100-80": Machine("NVIDIA A100 SXM 80GB", 79.2 * GIB, 312e12, 19.5e12, 300e9),
    "b200": Machine("NVIDIA B200 SXM", 178.0 * GIB, 2250e12, 75e12, 900e9),
    "cpu": Machine("CPU", 16 * GIB, 0.1e12, 0.1e12, 10e9, reserve=0.5 * GIB, spare=0.02, cuda=False),
}


def find_machine(name: str, memory_gib: float | None = None, tflops: float | None = None) -> Machine:
    """The machine of that name, or one of your own: any name with both memory and peak.

    memory_gib, tflops: in place of the table's. ValueError for a name that is neither.
    """
    if name in MACHINES:
        machine = MACHINES[name]
    elif memory_gib is not None and tflops is not None:
        machine = Machine(name, memory_gib * GIB, tflops * 1e12, tflops * 1e12, 450e9)
    else:
        raise ValueError(
            f"--gpu {name!r} is not known; use {', '.join(MACHINES)}, or give both --gpu-memory and "
            "--gpu-tflops"
        )
    if memory_gib is not None:
        machine = replace(machine, memory=memory_gib * GIB)
    if tflops is not None:
        machine = replace(machine, bf16=tflops * 1e12, fp32=tflops * 1e12)
    return machine
