"""Optimizers and the learning-rate schedule: parameter groups, one client optimizer for Muon and AdamW."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lclm.train.settings import ComponentSettings, ScheduleSettings


def scheduled_rate(schedule: ScheduleSettings, base: float, step: int, progress: float) -> float:
    """The rate of the step after `step` done ones, with `progress` in [0, 1] of the stage's budget behind."""
    warm = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.kind == "constant":
        return base * warm
    decayed = min(1.0, max(0.0, (progress - 1 + schedule.decay_share) / schedule.decay_share))
    share = 1 - decayed if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * decayed))
    floor = min(schedule.min_lr, base)
    return warm * (floor + (base - floor) * share)


Group = dict[str, Any]
"""A torch parameter group with `name`, `component`, `kind` ("decay" | "plain" | "muon") and `base_lr`."""


def parameter_groups(
    components: Mapping[str, Sequence[tuple[str, torch.nn.Parameter]]],
    learn: Mapping[str, ComponentSettings],
    embeddings: set[int] | None = None,
) -> list[Group]:
    """One group per (component, kind) of the parameters that require a gradient.

    `embeddings` holds the ids of parameters that Muon must not touch although they are matrices. Muon's
    matrices and decaying matrices of AdamW are exactly the parameters of two dimensions or more.
    """
    groups: list[Group] = []
    for component, settings in learn.items():
        kinds: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
        for _, parameter in components[component]:
            if parameter.requires_grad:
                kinds[_kind(parameter, settings, embeddings or set())].append(parameter)
        groups += [
            {"params": kinds[kind], **group_settings(component, kind, settings)}
            for kind in ("muon", "decay", "plain")
            if kinds[kind]
        ]
    return groups


def _kind(parameter: torch.nn.Parameter, settings: ComponentSettings, embeddings: set[int]) -> str:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if settings.muon and len(shape) == 2 and id(parameter) not in embeddings:
        return "muon"
    return "decay" if settings.weight_decay and len(shape) >= 2 else "plain"


def group_settings(component: str, kind: str, settings: ComponentSettings) -> Group:
    """Everything of a group but its parameters; set at construction and again after every load."""
    name = {"muon": f"{component}.muon", "decay": component, "plain": f"{component}.plain"}[kind]
    shared: Group = {"name": name, "component": component, "kind": kind}
    if kind == "muon":
        muon = settings.muon
        assert muon is not None
        return shared | {
            "lr": muon.lr,
            "base_lr": muon.lr,
            "weight_decay": muon.weight_decay,
            "momentum": muon.momentum,
            "ns_steps": muon.ns_steps,
        }
    return shared | {
        "lr": settings.lr,
        "base_lr": settings.lr,
        "weight_decay": settings.weight_decay if kind == "decay" else 0.0,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
    }


def build_optimizer(groups: list[Group]) -> torch.optim.Optimizer:
    """AdamW, or Muon and AdamW in one where a group asks for it."""
    if any(group["kind"] == "muon" for group in groups):
        return MuonAdamW(groups)
    return torch.optim.AdamW(groups, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for groups of kind "muon", torch's fused AdamW for the others.

    Needs whole matrices and gradients that are equal on every process (ZeRO 0). Same-shaped matrices are
    orthogonalised together, shared out over the processes, so that the cost falls with their number; momentum
    is kept whole on each. The iteration runs in bf16 on CUDA and in fp32 on a CPU: torch.optim.Muon, which
    always takes bf16, was 20 times slower than this on a CPU without bf16 instructions.
    """

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {})
        self._adamw = torch.optim.AdamW([torch.nn.Parameter(torch.empty(0))], fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient are left alone."""
        assert closure is None, "a closure is not supported"
        muon = [group for group in self.param_groups if group["kind"] == "muon"]
        if muon:
            self._muon(muon)
        adamw = [group for group in self.param_groups if group["kind"] != "muon"]
        if adamw:
            for group in adamw:
                for key, value in self._adamw.defaults.items():
                    group.setdefault(key, value)
            self._adamw.param_groups, self._adamw.state = adamw, self.state
            self._adamw.step()

    def _muon(self, groups: list[Group]) -> None:
        matrices: list[torch.Tensor] = []
        steps: list[int] = []
        for group in groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                gradients = [parameter.grad for parameter in parameters]
                momenta = [self._momentum(parameter) for parameter in parameters]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, gradients)
                nesterov = torch._foreach_mul(momenta, group["momentum"])
                torch._foreach_add_(nesterov, gradients)
                matrices += nesterov
                steps += [group["ns_steps"]] * len(parameters)
        updates = iter(orthogonalised(matrices, steps))
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    scale = math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(next(updates), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalised(matrices: list[torch.Tensor], steps: list[int]) -> list[torch.Tensor]:
    """Each matrix with its singular values brought near 1 by so many Newton-Schulz steps, in its dtype.

    Called alike on every process: each works on its share and all get everything.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    alike: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[(min(matrix.shape), max(matrix.shape), steps[index])].append(index)
    results: list[torch.Tensor] = [torch.empty(0)] * len(matrices)
    for (rows, columns, count), members in alike.items():
        wide = [matrices[i] if matrices[i].shape[0] == rows else matrices[i].T for i in members]
        share = -(-len(wide) // world)
        padded = wide + wide[:1] * (share * world - len(wide))
        mine = newton_schulz(torch.stack(padded[rank * share : (rank + 1) * share]), count)
        if world > 1:
            gathered = mine.new_empty(share * world, rows, columns)
            dist.all_gather_into_tensor(gathered, mine.contiguous())
            mine = gathered
        for i, result in zip(members, mine.to(matrices[0].dtype).unbind(), strict=False):
            results[i] = result if matrices[i].shape[0] == rows else result.T
    return results


def newton_schulz(batch: torch.Tensor, steps: int) -> torch.Tensor:
    """[n, rows, columns] with rows <= columns -> the same with singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = batch.bfloat16() if batch.is_cuda else batch.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def embedding_ids(model: torch.nn.Module) -> set[int]:
    """Ids of the weights of embeddings and of what is tied to them, which Muon must not touch."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return tables | ({id(head.weight)} if head is not None else set())
