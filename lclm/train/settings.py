"""The recipe's `stages:`, `engine:` and `train:` sections. No torch here: reading a recipe stays light."""

from __future__ import annotations

from dataclasses import dataclass, field

from lclm.data.settings import PackSettings

COMPONENTS = ("encoder", "adapter", "decoder", "brackets")
"""What a stage may train. Brackets: the rows of the two memory marks. Tied weights belong to the decoder."""


@dataclass
class MuonSettings:
    """Muon for the matrices of a component's blocks; embeddings, norms, biases stay with AdamW. ZeRO 0 only.

    `ns_steps` Newton-Schulz iterations orthogonalise the update; fewer are cheaper and less exact.
    """

    lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.01
    ns_steps: int = 5


@dataclass
class LoraSettings:
    """LoRA through PEFT: the component's own weights freeze and low-rank additions learn instead."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class ComponentSettings:
    """How one component learns in a stage; `weight_decay` applies to matrices only (not norms and biases)."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon: MuonSettings | None = None
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if self.muon and self.lora:
            raise ValueError("muon and lora cannot be used together on one component; remove one")
        if self.lr <= 0 or (self.muon and self.muon.lr <= 0):
            raise ValueError("a learning rate must be above 0; leave a component out of `learn` to freeze it")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; give two numbers in [0, 1)")


@dataclass
class ScheduleSettings:
    """Rate over a stage: a linear warm-up times `kind`, falling to `min_lr` over the last `decay_share`."""

    kind: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 0
    min_lr: float = 0.0
    decay_share: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule.kind is {self.kind!r}; use cosine, linear or constant")
        if not 0 < self.decay_share <= 1:
            raise ValueError(
                f"schedule.decay_share is {self.decay_share}; it is a share of the stage in (0, 1]"
            )


@dataclass
class StageSettings:
    """One phase of training, so many `steps` or so many `tokens` (source tokens of all processes) long."""

    learn: dict[str, ComponentSettings] = field(default_factory=dict)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    steps: int | None = None
    tokens: float | None = None
    clip: float = 1.0  # global gradient norm; 0 = no clipping
    mixture: dict[str, float] | None = None  # override of data.mixture
    pack: PackSettings | None = None  # override of data.pack
    zero: int | None = None  # override of engine.zero

    def __post_init__(self) -> None:
        if self.zero not in (None, 0, 1, 2, 3):
            raise ValueError(f"zero is {self.zero}; ZeRO stages are 0, 1, 2 and 3")
        if self.clip < 0:
            raise ValueError(f"clip is {self.clip}; give a gradient norm, or 0 for no clipping")


@dataclass
class ActivationCheckpointing:
    """Recompute a component's block activations in the backward pass instead of keeping them."""

    encoder: bool = False
    decoder: bool = False


@dataclass
class CompileSettings:
    """torch.compile of a component's blocks, each block kind once. It changes rounding."""

    encoder: bool = False
    decoder: bool = False


@dataclass
class EngineSettings:
    """How training is executed. Accumulation is derived: lanes / (processes * micro_batch)."""

    zero: int = 0  # ZeRO stage 0 | 1 | 2 | 3
    precision: str = "fp32"  # fp32 | bf16 (fp32 master weights and moments)
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    compile: CompileSettings = field(default_factory=CompileSettings)
    offload_optimizer: bool = False  # masters, moments and their update on the CPU; ZeRO 3
    bucket_elements: int = 50_000_000  # elements per reduce and gather bucket
    timeout_minutes: float = 10.0  # without an answer, or in one phase of a step: the process is lost
    alone_minutes: float = 120.0  # at a stage's start, in the main process's own work

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero is {self.zero}; ZeRO stages are 0, 1, 2 and 3")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"engine.precision is {self.precision!r}; use fp32 or bf16")
        if not 0 < self.timeout_minutes <= self.alone_minutes:
            raise ValueError(
                f"engine.timeout_minutes is {self.timeout_minutes} and engine.alone_minutes is "
                f"{self.alone_minutes}; both must be above 0, and the second not below the first"
            )


@dataclass
class SpikeSettings:
    """Leave out steps whose loss jumps: on garbage data, for example. Judged by task, before the update.

    A step is one if a task's loss is above `factor` times its mean over the last `window_steps` steps, and
    more than `sigmas` standard deviations above it; nothing is judged before half the window is seen.
    action: skip leaves out the step; rewind also goes back to the stage's newest checkpoint and on with the
    data after the step, at most `max_rewinds` times a stage (null: 3), then skips.
    """

    sigmas: float = 8.0
    factor: float = 1.2
    window_steps: int = 64
    action: str = "skip"  # skip | rewind
    max_rewinds: int | None = None

    def __post_init__(self) -> None:
        where = "train.spike"
        if self.action not in ("skip", "rewind"):
            raise ValueError(f"{where}.action is {self.action!r}; use skip or rewind")
        if self.max_rewinds is not None and self.action == "skip":
            raise ValueError(f"{where}.max_rewinds has no effect with action skip; remove it, or use rewind")
        if self.max_rewinds is not None and self.max_rewinds < 1:
            raise ValueError(f"{where}.max_rewinds is {self.max_rewinds}; it must be at least 1")
        if self.sigmas <= 0 or self.factor < 1 or self.window_steps < 4:
            raise ValueError(
                f"{where}: sigmas must be above 0, factor at least 1 and window_steps at least 4, not "
                f"{self.sigmas:g}, {self.factor:g} and {self.window_steps}"
            )

    @property
    def rewinds(self) -> int:
        """How often a stage may go back."""
        return 0 if self.action == "skip" else 3 if self.max_rewinds is None else self.max_rewinds


@dataclass
class TrainSettings:
    """What the loop does beside stepping. Settings of saving, logging and time may change on resume."""

    save_every_steps: int | None = 500
    save_every_minutes: float | None = None
    keep: int = 2  # newest training checkpoints kept
    save: str = "async"  # async: a snapshot in memory, written while training goes on | sync
    snapshot_folder: str = "/dev/shm"  # a file system in memory
    max_failed_saves: int = 3  # checkpoints in a row that could not be written before the run stops
    log_every: int = 10  # steps between lines of metrics.jsonl
    validate_every: int | None = None  # steps; null = only at the end of each stage
    validate_batches: int = 8  # held-out batches, each as large as a step's; 0 = no validation
    probe_every: int | None = None  # steps; null = only at the end of the run
    stop_after_steps: int | None = None  # of one start; saved, exit code 75: start again to go on
    stop_after_minutes: float | None = None  # of one start, likewise
    stop_before_limit_minutes: float = 3.0  # likewise, before the scheduler's limit, where it tells one
    fit_minutes: float | None = None  # scale all stages' budgets down so that their steps take at most this
    fit_steps: int = 8  # steps of each stage measured for it
    max_skips_in_a_row: int = 5  # steps left out (not finite, or a spike) before the run stops
    spike: SpikeSettings | None = None  # leave out steps whose loss jumps; null = only what is not finite
    preflight: bool = True  # before the first step: same code, data, versions everywhere; room on the disk
    peak_tflops: float | None = None  # per process, for MFU; null = measured matrix-multiplication rate

    def __post_init__(self) -> None:
        for name in (
            "save_every_steps",
            "validate_every",
            "probe_every",
            "keep",
            "log_every",
            "max_skips_in_a_row",
            "max_failed_saves",
            "stop_after_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} is {value}; it must be at least 1")
        if self.save not in ("async", "sync"):
            raise ValueError(f"train.save is {self.save!r}; use async or sync")
        for name in ("stop_after_minutes", "stop_before_limit_minutes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"train.{name} is {value}; it must be at least 0")
