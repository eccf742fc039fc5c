"""The DeepSpeed engine: its settings, configuration, construction, saving and loading."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ActivationCheckpointing:
    """Recompute a component's block activations in the backward pass instead of keeping them."""

    encoder: bool = False
    decoder: bool = False


@dataclass
class EngineSettings:
    """How training is executed. Accumulation is derived: lanes / (processes * micro_batch)."""

    zero: int = 0  # ZeRO stage 0 | 1 | 2 | 3
    precision: str = "fp32"  # fp32 | bf16 (fp32 master weights and moments)
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    bucket_elements: int = 50_000_000  # elements per reduce and gather bucket
    timeout_minutes: float = 30.0  # of a collective
