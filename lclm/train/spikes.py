"""Loss spikes: a step whose loss stands far above those before it, seen task by task before the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lclm.train.settings import SpikeSettings

Losses = Mapping[str, tuple[float, float]]
"""{task: (nats, loss-bearing tokens)} of one step over all processes."""


class Rewind(Exception):
    """Go back to the stage's newest checkpoint, and on with the data after a spike. Raised on all processes.

    data: where all lanes stand after the spike. rewinds: how often the stage has gone back, this time
    included. about: figures for the event.
    """

    def __init__(self, data: dict[str, Any], rewinds: int, about: dict[str, Any]) -> None:
        super().__init__(f"rewind {rewinds}")
        self.data, self.rewinds, self.about = data, rewinds, about


class Spikes:
    """What the last steps' losses were, and whether another stands out. Equal on every process.

    seen: {task: [[nats per token, tokens], ...]} of the last steps with that task, oldest first: plain data,
    changed in place, so that it can be part of the run's state. A mixture varies from step to step, so each
    task has its own mean, and what a loss may differ from it depends on how many tokens it was taken over.
    """

    def __init__(self, settings: SpikeSettings | None) -> None:
        self.settings = settings
        self.seen: dict[str, list[list[float]]] = {}

    def find(self, losses: Losses) -> dict[str, Any] | None:
        """The task that stands out most, with its loss and what was expected; None if none does."""
        if self.settings is None:
            return None
        found: dict[str, Any] | None = None
        for task, (nats, tokens) in losses.items():
            steps = self.seen.get(task, [])
            if not tokens or len(steps) < self.settings.window_steps // 2:
                continue
            mean, spread = expected(steps, tokens)
            loss = nats / tokens
            sigmas = (loss - mean) / spread if spread else math.inf
            if loss > self.settings.factor * mean and sigmas > self.settings.sigmas:
                about = {"task": task, "loss": loss, "expected": mean, "sigmas": min(sigmas, 1e9)}
                if found is None or about["sigmas"] > found["sigmas"]:
                    found = about
        return found

    def add(self, losses: Losses) -> None:
        """Remember a step that was taken."""
        if self.settings is None:
            return
        for task, (nats, tokens) in losses.items():
            if tokens:
                steps = self.seen.setdefault(task, [])
                steps.append([nats / tokens, tokens])
                del steps[: -self.settings.window_steps]


def expected(steps: list[list[float]], tokens: float) -> tuple[float, float]:
    """Mean of the steps' losses, and the standard deviation of that of a step of so many tokens."""
    total = math.fsum(weight for _, weight in steps)
    mean = math.fsum(loss * weight for loss, weight in steps) / total
    squares = math.fsum(weight * (loss - mean) ** 2 for loss, weight in steps)
    return mean, math.sqrt(squares / max(1, len(steps) - 1) / tokens)
