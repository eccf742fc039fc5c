"""Memory of a training step on one process: what the engine keeps at each ZeRO stage, and activations.

What DeepSpeed keeps was read from its source (0.19) and is checked against measured peaks by
`benchmarks/memory.py`. L: elements that learn, A: all, n: processes, p: bytes of the model's precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lclm.train.planning.rehearsal import Rehearsed

REDUCED_AT_ONCE = 500_000_000
"""Elements that DeepSpeed reduces at once at ZeRO 0."""
GATHERED = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered at most while they will soon be used again."""


@dataclass(frozen=True)
class Weights:
    """Elements of a model in a stage: of all, of those that learn (by optimizer group), of Muon's matrices,
    and of the largest tensor that learns."""

    total: int
    groups: tuple[int, ...]
    muon: int = 0
    largest: int = 0

    @property
    def learning(self) -> int:
        """Elements that learn."""
        return sum(self.groups)


@dataclass(frozen=True)
class Engine:
    """What decides how much the engine keeps."""

    zero: int
    bf16: bool
    processes: int
    accumulation: int
    bucket: int
    overlap: bool
    offload: bool = False

    @property
    def bytes(self) -> int:
        """Of one element in the model's precision."""
        return 2 if self.bf16 else 4

    def bucket_of(self, weights: Weights) -> int:
        """Elements of a bucket, as the engine sets it."""
        return max(1024, min(self.bucket, weights.learning))


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the step's worst moment, and on the host where something is offloaded."""

    parts: Mapping[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Held:
    """What gradients take while the passes run: see `rehearsal.Work`."""

    per_element: float
    from_start: bool
    at_first: float


def held_gradients(weights: Weights, engine: Engine) -> Held:
    """What gradients take while the passes run, but for ZeRO 3's, which are there from the start of the run.

    At ZeRO 2 this process's part is one piece of memory from the first gradient on; on a CPU a page of it
    counts once it is written.
    """
    early = engine.accumulation > 1
    if engine.zero == 3:
        return Held(0.0, False, 0.0)
    if engine.zero < 2:
        always = early or bool(engine.zero and engine.bf16)  # ZeRO 1 in bf16 never frees its fp32 gradients
        return Held(4.0 if engine.zero else float(engine.bytes), always, 0.0)
    twice = 2 if early and not engine.bf16 else 1
    share = 4.0 / engine.processes
    buckets = _buckets(weights, engine)
    if engine.overlap and not early:
        return Held(0.0, False, buckets + share * weights.learning)
    return Held(share * twice, early, buckets)


def memory(weights: Weights, engine: Engine, rehearsed: Rehearsed) -> Memory:
    """The larger of two moments: the worst one of forward and backward, and the optimizer's step."""
    learning, n, size = weights.learning, engine.processes, engine.bytes
    share = learning / n if engine.zero else float(learning)
    state = {
        "parameters": size * (weights.total / n if engine.zero == 3 else float(weights.total)),
        "fp32 masters": 4 * share if engine.zero or engine.bf16 else 0.0,
        "optimizer moments": 8 * share - 4 * (weights.muon if not engine.zero else 0),
    }
    host = 0.0
    if engine.offload:
        host = state["fp32 masters"] + state["optimizer moments"] + 8 * share
        state |= {"fp32 masters": 0.0, "optimizer moments": 0.0}
    if engine.zero == 3:
        gathered = min(weights.total, GATHERED)
        state["gathered parameters"] = float(size * gathered)
    passes = state | {"gradients": rehearsed.gradients, "activations": rehearsed.activations}
    if engine.zero == 3:
        passes |= {"gradients": 0.0 if engine.offload else 4 * share, "buckets": _buckets(weights, engine)}
    elif engine.zero == 2:
        buckets = min(_buckets(weights, engine), rehearsed.at_first)
        passes["gradients"] += rehearsed.at_first - buckets
        passes["buckets"] = buckets
    step = state | _step(weights, engine, share)
    parts = max((passes, step), key=lambda found: sum(found.values()))
    return Memory({name: value for name, value in parts.items() if value}, host)


def _buckets(weights: Weights, engine: Engine) -> float:
    """Buffers in which gradients travel during the passes, at ZeRO 2 and 3."""
    bucket = engine.bucket_of(weights)
    copies = 2 if engine.overlap and engine.zero == 2 else 1
    buffers = (4 if engine.zero == 3 else engine.bytes) * bucket * copies
    travelling = 4 * max(bucket, weights.largest) if engine.bf16 or engine.zero == 3 else 0
    return float(buffers + travelling)


def _step(weights: Weights, engine: Engine, share: float) -> dict[str, float]:
    """Gradients and their copies when the optimizer steps."""
    learning = weights.learning
    bucket = engine.bucket_of(weights)
    largest = max(weights.groups, default=0)
    if engine.zero == 0:
        reducing = engine.bytes * min(learning, REDUCED_AT_ONCE)  # by one process too
        updating = 4 * learning if engine.bf16 else 0
        return {"gradients": float(engine.bytes * learning), "buckets": float(max(reducing, updating))}
    if engine.offload:
        return {"buckets": 4.0 * bucket}
    if engine.zero == 1:
        buffers = 4.0 * (min(learning, REDUCED_AT_ONCE) if engine.bf16 else (1 + engine.overlap) * bucket)
        return {"gradients": 4.0 * learning, "buckets": buffers}
    copy = 0.0 if engine.zero == 2 and engine.bf16 else 4 * largest / engine.processes
    return {"gradients": 4 * share, "buckets": copy + (4.0 * bucket if engine.zero == 3 else 0.0)}


def weights_of(model: Any, groups: list[dict[str, Any]]) -> Weights:
    """Elements of a prepared model and of its optimizer groups."""
    sizes = tuple(sum(weight.numel() for weight in group["params"]) for group in groups)
    muon = sum(size for size, group in zip(sizes, groups, strict=True) if group["kind"] == "muon")
    total = sum(weight.numel() for weight in model.parameters())
    largest = max((w.numel() for group in groups for w in group["params"]), default=0)
    return Weights(total, sizes, muon, largest)
