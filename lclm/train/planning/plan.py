"""What a recipe will cost on given machines: memory, time, network, storage; and what to change if it does
not fit.

Everything comes from the recipe and its configurations, on meta tensors: no weights, no data, no accelerator.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from lclm.train.planning.filling import Filling, filling
from lclm.train.planning.hardware import Machine
from lclm.train.planning.memory import Engine, Memory, Weights, held_gradients, memory, weights_of
from lclm.train.planning.rehearsal import PARTS, Rehearsed, Work, rehearse
from lclm.train.settings import ActivationCheckpointing

KEEPS_FOR_DISK = 1
"""Checkpoints beside `train.keep` for which there must be room: the one that is being written."""


@dataclass(frozen=True)
class Cluster:
    """Machines and what they can do together.

    efficiency: share of the peak that forward and backward passes reach. network: bytes a second and process
    between nodes. storage: bytes a second of all processes together. price: of one hour of one machine.
    """

    machine: Machine
    nodes: int = 1
    per_node: int = 8
    efficiency: float = 0.4
    network: float = 50e9
    storage: float = 5e9
    price: float | None = None

    @property
    def processes(self) -> int:
        """Processes in all."""
        return self.nodes * self.per_node

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a process can send in a collective of all."""
        return self.machine.link if self.nodes == 1 else min(self.network, self.machine.link)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step, and seconds. hidden: behind the passes; open: after them."""

    reduced: float
    gathered: float
    hidden: float
    open: float

    @property
    def seconds(self) -> float:
        """All of it, were nothing hidden."""
        return self.hidden + self.open


@dataclass(frozen=True)
class Proposal:
    """Settings under which a stage fits (if `fits`), and the memory it then takes, planned again."""

    settings: list[str]
    memory: float
    fits: bool


@dataclass
class StagePlan:
    """One stage. FLOPs are of one process and step, seconds of one step, memory of one process."""

    name: str
    weights: Weights
    zero: int
    filling: Filling
    steps: int
    tokens: float
    memory: Memory
    choices: dict[str, float]
    flops: dict[str, float]
    recomputed: dict[str, float]
    compute: float
    traffic: Traffic
    checkpoint: float
    proposal: Proposal | None = None

    @property
    def seconds(self) -> float:
        """One step: the passes or the traffic behind them, whichever is longer, then the open traffic."""
        return max(self.compute, self.traffic.hidden) + self.traffic.open

    @property
    def hours(self) -> float:
        """The whole stage."""
        return self.steps * self.seconds / 3600


@dataclass
class Plan:
    """All stages on a cluster. problems: what would stop the run before its first step, or keep a stage
    from learning as it should."""

    recipe: Any
    cluster: Cluster
    counts: dict[str, int]
    stages: list[StagePlan]
    accumulation: int
    lanes: int
    shards: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """All steps of all stages."""
        return sum(stage.hours for stage in self.stages)

    @property
    def machine_hours(self) -> float:
        """GPU-hours of all steps."""
        return self.hours * self.cluster.processes

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the machine's memory."""
        return all(stage.memory.total <= self.cluster.machine.usable for stage in self.stages)

    @property
    def disk(self) -> float:
        """Bytes that the run folder may take: checkpoints, and an export of each stage and of the run."""
        return disk_needed(self.recipe, self.counts, [stage.checkpoint for stage in self.stages])


class Planner:
    """Plans stages of one recipe on one cluster; what was rehearsed is rehearsed once."""

    def __init__(self, recipe: Any, cluster: Cluster, rehearsed: dict[Any, Rehearsed] | None = None) -> None:
        from lclm.model.build import build_model

        self.recipe, self.cluster = recipe, cluster
        self.bf16 = recipe.engine.precision == "bf16"
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.model = build_model(recipe.model, device="meta", dtype=self.dtype)
        self._rehearsed: dict[Any, Rehearsed] = {} if rehearsed is None else rehearsed

    @property
    def counts(self) -> dict[str, int]:
        """Parameters of each component."""
        from lclm.model.build import components

        found = components(self.model)
        return {part: sum(weight.numel() for _, weight in weights) for part, weights in found.items()}

    @property
    def row_length(self) -> int:
        """Tokens of an encoder row."""
        config = copy.deepcopy(self.model.config)
        for name in ("memory_start_id", "memory_id", "memory_end_id", "pad_id"):
            setattr(config, name, 0)
        config.encoder_pad_id = config.encoder_marker_id = 0
        return config.geometry().row_length

    def prepared(self, stage: Any, checkpointing: ActivationCheckpointing) -> Any:
        """The stage's model on meta tensors, and its optimizer groups."""
        from lclm.model.build import components
        from lclm.train.optim import embedding_ids, parameter_groups
        from lclm.train.stages import prepare

        model = copy.deepcopy(self.model)
        with torch.device("meta"):
            prepare(model, stage, checkpointing)
        return model, parameter_groups(components(model), stage.learn, embedding_ids(model))

    def engine(self, recipe: Any, stage: Any) -> Engine:
        """What decides what the engine keeps; lanes that do not divide are taken as rounded up."""
        packs = self.cluster.processes * recipe.data.micro_batch
        return Engine(
            recipe.engine.zero if stage.zero is None else stage.zero,
            self.bf16,
            self.cluster.processes,
            max(1, math.ceil(recipe.data.lanes / packs)),
            recipe.engine.bucket_elements,
            overlap=self.cluster.machine.cuda,
            offload=recipe.engine.offload_optimizer,
        )

    def rehearse(
        self, recipe: Any, name: str, checkpointing: ActivationCheckpointing, found: Filling | None = None
    ) -> Rehearsed:
        """One micro-batch of a stage. found: for the FLOPs; None: fully packed, every position with loss."""
        from lclm.model.loss import CPU_LOGITS, CUDA_LOGITS
        from lclm.train.stages import prepare

        stage, settings = recipe.stages[name], recipe.stage_data(name)
        engine = self.engine(recipe, stage)
        model, groups = self.prepared(stage, checkpointing)
        held = held_gradients(weights_of(model, groups), engine)
        pack, batch = settings.pack, settings.micro_batch
        work = Work(
            micro_batch=batch,
            positions=pack.positions,
            rows=pack.rows,
            row_length=self.row_length,
            latents=pack.latents,
            loss_tokens=batch * (pack.positions - 1),
            dtype=self.dtype,
            kernel=kernel(recipe.model.attention, self.cluster.machine),
            max_logits=CUDA_LOGITS if self.cluster.machine.cuda else CPU_LOGITS,
            segments=found.segments if found else (self.row_length, pack.positions),
            max_rows=recipe.model.max_rows_per_forward,
            held=held.per_element,
            held_from_start=held.from_start,
            at_first=held.at_first,
        )
        learns = tuple((part, repr(s.lora)) for part, s in sorted(stage.learn.items()))
        key = (learns, checkpointing.encoder and "encoder" in stage.learn, checkpointing.decoder, work)
        if key not in self._rehearsed:
            self._rehearsed[key] = rehearse(
                self.model, lambda model: prepare(model, stage, checkpointing), work
            )
        return self._rehearsed[key]

    def memory(
        self, name: str, recipe: Any = None, checkpointing: ActivationCheckpointing | None = None
    ) -> Memory:
        """Memory of a stage under the settings of `recipe` (the planner's own if left out)."""
        recipe = recipe or self.recipe
        stage = recipe.stages[name]
        checkpointing = checkpointing or recipe.engine.activation_checkpointing
        model, groups = self.prepared(stage, checkpointing)
        rehearsed = self.rehearse(recipe, name, checkpointing, self._filling(name))
        return memory(weights_of(model, groups), self.engine(recipe, stage), rehearsed)

    def _filling(self, name: str) -> Filling:
        if not hasattr(self, "_fillings"):
            self._fillings: dict[str, Filling] = {}
        if name not in self._fillings:
            self._fillings[name] = filling(self.recipe, name, self.model.config.window, self.row_length)
        return self._fillings[name]

    def stage(self, name: str) -> StagePlan:
        """The plan of one stage, with a proposal where it does not fit."""
        recipe, stage, cluster = self.recipe, self.recipe.stages[name], self.cluster
        chosen, found = recipe.engine.activation_checkpointing, self._filling(name)
        model, groups = self.prepared(stage, chosen)
        weights, engine = weights_of(model, groups), self.engine(recipe, stage)
        plain = self.rehearse(recipe, name, ActivationCheckpointing(), found)
        run = self.rehearse(recipe, name, chosen, found)
        flops, recomputed = self._flops(plain, run, found, recipe, engine.accumulation)
        tokens = found.source_tokens * engine.accumulation * recipe.data.micro_batch * cluster.processes
        whole = sum(flops.values()) + sum(recomputed.values())
        planned = StagePlan(
            name,
            weights,
            engine.zero,
            found,
            stage.steps or math.ceil(stage.tokens / tokens),
            tokens,
            memory(weights, engine, run),
            self._choices(name, stage),
            flops,
            recomputed,
            whole / (cluster.machine.peak(recipe.engine.precision) * cluster.efficiency),
            traffic(weights, engine, cluster),
            checkpoint_bytes(weights, engine),
        )
        if planned.memory.total > cluster.machine.usable:
            from lclm.train.planning.proposals import propose

            planned.proposal = propose(self, name)
        return planned

    def _flops(
        self, plain: Rehearsed, run: Rehearsed, found: Filling, recipe: Any, times: int
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(of the model, recomputed) by part, of a step's micro-batches."""
        pack = recipe.data.pack
        with_loss = found.loss_tokens / max(1, pack.positions - 1)
        again = plain.forward["loss"] if self._loss_in_chunks(pack.positions) else 0.0
        model = dict(plain.flops) | {"loss": (plain.flops["loss"] - again) * with_loss}
        more = {part: run.flops[part] - plain.flops[part] for part in PARTS} | {"loss": again * with_loss}
        return {k: v * times for k, v in model.items()}, {k: v * times for k, v in more.items()}

    def _loss_in_chunks(self, positions: int) -> bool:
        from lclm.model.loss import CPU_LOGITS, CUDA_LOGITS

        most = CUDA_LOGITS if self.cluster.machine.cuda else CPU_LOGITS
        tokens = (positions - 1) * self.recipe.data.micro_batch
        return tokens > max(1, most // self.model.decoder.config.vocab_size)

    def _choices(self, name: str, stage: Any) -> dict[str, float]:
        """Memory in all for every choice of activation checkpointing that makes a difference."""
        choices = {"none": (False, False), "decoder": (False, True)}
        if "encoder" in stage.learn:
            choices |= {"encoder": (True, False), "both": (True, True)}
        return {
            label: self.memory(name, checkpointing=ActivationCheckpointing(*choice)).total
            for label, choice in choices.items()
        }


def make_plan(recipe: Any, cluster: Cluster) -> Plan:
    """The plan of a recipe. ValueError for a model that cannot be built from the recipe alone."""
    planner = Planner(recipe, cluster)
    counts = planner.counts
    stages = [planner.stage(name) for name in recipe.stages]
    packs = cluster.processes * recipe.data.micro_batch
    lanes = math.ceil(recipe.data.lanes / packs) * packs
    share = lanes // cluster.processes
    workers = max(n for n in range(min(recipe.data.workers, share) + 1) if n == 0 or share % n == 0)
    plan = Plan(
        recipe,
        cluster,
        counts,
        stages,
        lanes // packs,
        lanes,
        shards=max(lanes, cluster.processes * workers),
    )
    if lanes != recipe.data.lanes:
        plan.problems.append(
            f"{recipe.data.lanes} lanes do not divide over {cluster.processes} processes with "
            f"data.micro_batch={recipe.data.micro_batch}: set data.lanes={lanes} (figures are for it)"
        )
    for stage in stages:
        warmup = recipe.stages[stage.name].schedule.warmup_steps
        if warmup >= stage.steps:
            plan.problems.append(
                f"stage {stage.name} ends after {stage.steps:,} steps, within its {warmup:,} warm-up steps: "
                f"its rates never get to their height; give it more tokens or steps, or lower "
                f"stages.{stage.name}.schedule.warmup_steps"
            )
    if workers < recipe.data.workers:
        plan.notes.append(
            f"lanes of a process: {share}, so {workers} of data.workers={recipe.data.workers} background "
            "processes run; more lanes let more run"
        )
    if recipe.engine.compile.encoder or recipe.engine.compile.decoder:
        plan.notes.append("memory without engine.compile, which holds less")
    for stage in stages:
        for note in stage.filling.notes:
            if note not in plan.notes:
                plan.notes.append(note)
    return plan


def kernel(attention: str, machine: Machine) -> str:
    """How attention is computed: "blocks" skips what the mask hides, "sdpa" has a dense mask, "eager"."""
    if attention == "eager":
        return "eager"
    dense = attention == "sdpa" or (attention == "auto" and not machine.cuda)
    return "sdpa" if dense else "blocks"


def traffic(weights: Weights, engine: Engine, cluster: Cluster) -> Traffic:
    """What a process sends in a step. Gradients travel in fp32 where they are cut; ZeRO 1 and 2 reduce them
    by all-reduce (twice the bytes of a reduce-scatter), ZeRO 2 and 3 after every micro-batch."""
    n = engine.processes
    once = (n - 1) / n
    learning, times = weights.learning, engine.accumulation
    if engine.zero == 3:
        reduced = 4 * learning * once * times
        gathered = 2 * engine.bytes * weights.total * once * times
        return Traffic(reduced, gathered, (reduced + gathered) / cluster.bandwidth, 0.0)
    gradient = 4 if engine.zero else engine.bytes
    reduced = 2 * gradient * learning * once * (times if engine.zero == 2 else 1)
    gathered = engine.bytes * learning * once if engine.zero else 0.0
    hidden = reduced if engine.zero == 2 and engine.overlap else 0.0
    return Traffic(
        reduced,
        gathered,
        hidden / cluster.bandwidth,
        (reduced - hidden + gathered) / cluster.bandwidth,
    )


def checkpoint_bytes(weights: Weights, engine: Engine) -> float:
    """A training checkpoint: what learns in the model's precision, fp32 masters, moments."""
    masters = 4 if engine.zero or engine.bf16 else 0
    moments = 8 * weights.learning - (0 if engine.zero else 4 * weights.muon)
    return float((engine.bytes + masters) * weights.learning + moments)


def disk_needed(recipe: Any, counts: dict[str, int], checkpoints: list[float]) -> float:
    """Bytes at most: checkpoints kept and being written, exports of all stages and the run's."""
    exports = 4.0 * sum(counts.values()) * (len(checkpoints) + 1)
    return exports + max(checkpoints) * (recipe.train.keep + KEEPS_FOR_DISK)


def needed_disk(recipe: Any, processes: int) -> float:
    """Bytes that the run's folder may take at most. ValueError for a model that cannot be built."""
    from lclm.train.planning.hardware import MACHINES

    planner = Planner(recipe, Cluster(MACHINES["cpu"], per_node=processes))
    counts = planner.counts
    known: dict[str, Weights] = {}
    checkpoints = []
    for stage in recipe.stages.values():
        learns = repr([(part, own.lora, own.muon) for part, own in stage.learn.items()])
        if learns not in known:
            known[learns] = weights_of(*planner.prepared(stage, ActivationCheckpointing()))
        checkpoints.append(checkpoint_bytes(known[learns], planner.engine(recipe, stage)))
    return disk_needed(recipe, counts, checkpoints)
