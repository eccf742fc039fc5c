"""Fitting a run's budgets to a time: a few steps of every stage are measured, then thrown away."""

from __future__ import annotations

import copy
import time
from typing import Any

from lclm.train.processes import Processes
from lclm.train.step import Stepper

LEAST_STEPS = 2
"""Steps that a stage keeps, however slow the machine."""


def fit_budgets(recipe: Any, processes: Processes) -> Any:
    """The recipe with every stage's budget and warm-up scaled by one factor of at most 1. Collective.

    So that the steps of all stages take at most `train.fit_minutes` together; validation, probes, checkpoints
    and exports come on top. Returns the recipe itself where no time is set.
    """
    minutes = recipe.train.fit_minutes
    if minutes is None:
        return recipe
    seconds = {name: _seconds(recipe, name, processes) for name in recipe.stages}
    total = sum(
        value * budget_steps(recipe.stages[name], tokens) for name, (value, tokens) in seconds.items()
    )
    factor = min(1.0, minutes * 60 / total)
    if processes.main:
        print(
            f"{total / 60:.1f} minutes of steps were asked for, {minutes:g} are to be used: "
            f"budgets times {factor:.3f}",
            flush=True,
        )
    return scaled(recipe, factor)


def budget_steps(stage: Any, tokens_a_step: float) -> float:
    """The stage's budget in steps."""
    return stage.steps if stage.steps is not None else stage.tokens / max(tokens_a_step, 1.0)


def scaled(recipe: Any, factor: float) -> Any:
    """A copy of the recipe with budgets and warm-ups multiplied."""
    if factor >= 1:
        return recipe
    recipe = copy.deepcopy(recipe)
    for stage in recipe.stages.values():
        if stage.steps is not None:
            stage.steps = max(LEAST_STEPS, int(stage.steps * factor))
        else:
            stage.tokens = max(1.0, float(int(stage.tokens * factor)))
        stage.schedule.warmup_steps = int(stage.schedule.warmup_steps * factor)
    return recipe


def _seconds(recipe: Any, name: str, processes: Processes) -> tuple[float, float]:
    """(seconds, source tokens) of one step of a stage, from the run's start; nothing of it is kept."""
    stage = recipe.stages[name]
    stepper = Stepper(recipe, stage, None, processes)
    times, tokens = [], 0
    try:
        stepper.feed.go_to(None)
        for number in range(recipe.train.fit_steps + 1):
            started = time.perf_counter()
            batches = stepper.feed.next_step(stepper.clock)
            tally = stepper.step(
                batches, step=number, stage_step=number, progress=0.0, norms=False, save=False
            )
            times.append(time.perf_counter() - started)
            tokens += tally.source_tokens
    finally:
        stepper.close()
    kept = times[1:] or times
    return processes.largest(sum(kept) / len(kept)), tokens / len(times)
