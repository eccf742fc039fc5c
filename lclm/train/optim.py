"""Optimizers and the learning-rate schedule: settings, parameter groups, one client optimizer for Muon and AdamW."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MuonSettings:
    """Muon for the 2-D matrices of a component's blocks; everything else stays with AdamW. ZeRO 0 only."""

    lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.01
    nesterov: bool = True
    ns_steps: int = 5


@dataclass
class LoraSettings:
    """LoRA through PEFT: the component's own weights freeze and low-rank additions learn instead."""

    rank: int = 16
    alpha: float = 32.0
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


@dataclass
class ScheduleSettings:
    """Learning rate over a stage: linear warm-up, then `kind` down to `min_lr` over the last `decay_share` of it."""

    kind: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 0
    min_lr: float = 0.0
    decay_share: float = 1.0
