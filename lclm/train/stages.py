"""Stages: which components learn, at which rates, on which mixture, for how long."""

from __future__ import annotations

from dataclasses import dataclass, field

from lclm.data.packing import PackSettings
from lclm.train.optim import ComponentSettings, ScheduleSettings

COMPONENTS = ("encoder", "adapter", "decoder", "brackets")


@dataclass
class StageSettings:
    """One phase of training. Give `steps` or `tokens` (source tokens before compression, all ranks), not both."""

    learn: dict[str, ComponentSettings] = field(default_factory=dict)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    steps: int | None = None
    tokens: float | None = None
    clip: float = 1.0  # global gradient norm; 0 = no clipping
    mixture: dict[str, float] | None = None  # override of data.mixture
    pack: PackSettings | None = None  # override of data.pack
    zero: int | None = None  # override of engine.zero
