"""One optimizer step over the global batch: forward, backward, guard, update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lclm.data.batch import Step
from lclm.train.feed import Feed, Tally, inputs
from lclm.train.guard import Guard
from lclm.train.metrics import Clock
from lclm.train.optim import scheduled_rate
from lclm.train.processes import Processes
from lclm.train.spikes import Spikes
from lclm.train.stages import build_engine, start_processor

WORDS = {
    "loss": "non-finite loss",
    "gradient": "non-finite gradient",
    "spike": "spike of the loss (train.spike)",
}
"""Reasons for leaving out a step, in a message."""


class Stepper:
    """A stage's engine, guard and data on one process, at the stage's start `start` (None: the run's)."""

    def __init__(self, recipe: Any, stage: Any, start: Path | None, processes: Processes) -> None:
        self.recipe, self.stage, self.processes = recipe, stage, processes
        self.engine, self.frozen = build_engine(recipe, stage, start, processes)
        self.guard = Guard(self.engine, stage.clip, recipe.train.max_skips_in_a_row)
        self.spikes = Spikes(recipe.train.spike)
        self.processor = start_processor(recipe, start)
        self.feed = Feed(recipe, stage, self.engine.model.config, self.processor, processes)
        self.clock = Clock(processes.device)

    def rates(self, step: int, progress: float) -> dict[str, float]:
        """Learning rate of each parameter group for the step after `step` done ones of the stage."""
        schedule = self.stage.schedule
        return {
            group["name"]: scheduled_rate(schedule, group["base_lr"], step, progress)
            for group in self.engine.settings
        }

    def step(
        self,
        batches: Step,
        *,
        step: int,
        stage_step: int,
        progress: float,
        norms: bool,
        save: bool = False,
        stop: bool = False,
        unsaved: bool = False,
    ) -> Tally:
        """Take one step, or none if a loss of the global batch is not finite or a spike. Collective.

        Raises, on all processes, what ends the data of any, or that too much of them is damaged.

        step, stage_step: steps done in the run and in the stage. norms: whether gradient norms will be asked
        for. save, stop: whether this process wants a checkpoint, or to stop, after the step.
        unsaved: whether its checkpoint in the background failed.
        """
        engine, guard, clock = self.engine.deepspeed, self.guard, self.clock
        at = self.processes.at
        at("tally")
        tally = Tally(batches, self.processes, save, stop, unsaved)
        tally.damage = self.feed.damage(tally, batches)
        torch.manual_seed((self.recipe.seed * 1_000_003 + step) * 65_537 + self.processes.rank)
        self.engine.apply_settings(self.rates(stage_step, progress))
        guard.start_step(watch_norms=norms)
        items = max(1.0, tally.loss_tokens) / (self.processes.size * len(batches))
        for number, batch in enumerate(batches, 1):
            at("forward")
            clock.start()
            output = engine(**inputs(batch, self.processes.device), num_items_in_batch=items)
            clock.stop("forward")
            at("losses")
            good = tally.add_losses(batch, output, items)
            if number == len(batches) and not tally.not_finite:
                tally.spike = self.spikes.find(tally.task_losses)
            at("backward")
            clock.start()
            engine.backward(guard.loss(output.loss, good and tally.spike is None))
            clock.stop("backward")
            at("update")
            if number == len(batches):
                guard.before_step()
            engine.step()
            clock.stop("update")
        tally.skipped = guard.after_step(tally.suspects, WORDS[tally.reason])
        if not tally.skipped:
            self.spikes.add(tally.task_losses)
        clock.end_step()
        return tally

    def close(self) -> None:
        """Stop the data's background processes and free the engine."""
        self.feed.close()
        self.engine.close()
