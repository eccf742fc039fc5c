"""The guard: no non-finite loss or gradient, on whichever process, ever reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lclm.train.engine import Engine

NAMED_KEYS = 20
"""Keys of samples that an error message names at most."""


class Guard:
    """Watches one engine through its stage.

    A non-finite loss anywhere turns the step's gradients non-finite everywhere. Non-finite gradients (or a
    norm that overflows) make DeepSpeed leave out the step at ZeRO 1 to 3 and in bf16. At ZeRO 0 in fp32 it
    would not: there the guard drops the gradients. Weights and moments stay as they are, bit for bit.
    """

    def __init__(self, engine: Engine, clip: float, max_in_a_row: int) -> None:
        self.engine, self.clip, self.max_in_a_row = engine, clip, max_in_a_row
        self.skipped = self.in_a_row = 0
        self.blamed: list[str] = []
        self._own = engine.zero == 0 and not engine.bf16
        self._overflow = False
        self._squares: dict[str, torch.Tensor] = {}
        self.watch_norms = False
        engine.base.register_step_pre_hook(self._before_update)

    def loss(self, loss: torch.Tensor, good: bool) -> torch.Tensor:
        """The loss to go backward from: `loss`, or one with nan gradients, with which the step is left out.

        good: whether all processes' losses are finite, and no spike.
        """
        return loss if good else loss * float("nan")

    def before_step(self) -> None:
        """Called between a step's last backward pass and the engine's step: clips or drops gradients."""
        if not self._own:
            return
        self._squares = {}
        gradients = []
        for group in self.engine.base.param_groups:
            own = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if own:
                norms = torch.stack(torch._foreach_norm(own))
                self._add(group["component"], norms.square().sum())
                gradients += own
        total = torch.stack(list(self._squares.values())).sum().sqrt() if self._squares else torch.zeros(())
        self._overflow = not bool(torch.isfinite(total))
        if self._overflow:
            self.engine.deepspeed.zero_grad()
        elif self.clip and total > self.clip:
            torch._foreach_mul_(gradients, (self.clip / (total + 1e-6)).item())

    def after_step(self, suspects: Sequence[tuple[float, str]], reason: str) -> bool:
        """Whether the step was left out. Raises ValueError, on all processes, after too many in a row.

        `suspects` are losses and keys of the samples to be blamed on this process; afterwards `blamed` names
        those of all processes, the highest losses first. `reason` says what was wrong.
        """
        overflow = self._overflow if self._own else bool(self.engine.deepspeed.optimizer.overflow)
        if not overflow:
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        own = sorted(suspects, key=lambda pair: -pair[0])
        parts = self.engine.processes.gather((len(own), own[:NAMED_KEYS]))
        worst = sorted((pair for _, part in parts for pair in part), key=lambda pair: -pair[0])
        self.blamed = [key for _, key in worst[:NAMED_KEYS]]
        if self.in_a_row >= self.max_in_a_row:
            others = sum(count for count, _ in parts) - len(self.blamed)
            more = f" and {others} more" if others else ""
            raise ValueError(
                f"{self.in_a_row} steps in a row were left out because of a {reason}; samples of the last "
                f"one: {', '.join(self.blamed)}{more}. Look at them with `lclm data inspect`, lower the "
                "learning rate, or raise train.max_skips_in_a_row"
            )
        return True

    def gradient_norms(self) -> dict[str, float]:
        """{component: norm before clipping, "all": norm} of the last step. Collective at ZeRO 1 to 3.

        Needs `watch_norms` to have been true during the step.
        """
        names = sorted({settings["component"] for settings in self.engine.settings})
        squares = torch.stack([self._squares.get(name, torch.zeros(())).float().cpu() for name in names])
        if self.engine.zero:
            self.engine.processes.sum(squares := squares.to(self.engine.processes.device))
        norms = squares.sqrt()
        total = float(norms.norm())
        if not self._own:
            whole = float(self.engine.deepspeed.get_global_grad_norm() or 0.0)
            norms *= whole / total if total else 0.0
            total = whole
        return {name: float(norm) for name, norm in zip(names, norms, strict=True)} | {"all": total}

    def start_step(self, watch_norms: bool) -> None:
        """Forget the last step; `watch_norms` asks for the norms of this one."""
        self.watch_norms = watch_norms
        self._squares = {}

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._own or not self.watch_norms:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._add(group["component"], parameter.grad.float().norm().square())

    def _add(self, component: str, square: torch.Tensor) -> None:
        self._squares[component] = self._squares[component] + square if component in self._squares else square
