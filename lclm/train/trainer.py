"""The trainer: stages in order, each a loop of steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainSettings:
    """What the loop does beside stepping. Settings of saving, logging and time may change on resume."""

    save_every_steps: int | None = 500
    save_every_minutes: float | None = None
    keep: int = 2  # newest training checkpoints kept per stage
    log_every: int = 10  # steps between lines of metrics.jsonl
    validate_every: int | None = None  # steps; null = only at the end of each stage
    validate_batches: int = 8  # packs per lane; 0 = no validation
    probe_every: int | None = None  # steps; null = only at the end of the run
    fit_minutes: float | None = None  # scale all stages' budgets down so that training fits
    fit_steps: int = 8  # steps measured for it
    max_skips_in_a_row: int = 5  # non-finite steps before the run stops
    peak_tflops: float | None = None  # per process, for MFU; null = measured matrix-multiplication rate
