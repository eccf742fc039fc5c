"""Sharing out a model of which the main process alone has the weights; the others never hold it whole."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from lclm.train.processes import Processes


def scatter(
    model: torch.nn.Module, config: dict[str, Any], dtype: torch.dtype, processes: Processes
) -> dict[str, torch.Tensor]:
    """Partition `model` for ZeRO 3 over all processes, one weight after another. In place, collective.

    model: with weights on the main process, on the meta device elsewhere. config: DeepSpeed's. dtype: of the
    weights from here on. Returns, on the main process, the weights that learn as they were where the dtype
    rounds them; elsewhere {}.
    """
    from deepspeed import zero

    names = _names(model)
    processes.agree(_differs(processes.gather(_shapes(names))))
    for name, buffer in list(model.named_buffers()):
        value = buffer.to(processes.device) if processes.main else _empty(buffer, buffer.dtype, processes)
        dist.broadcast(value, 0)
        _put(model, name, value)
    before: dict[str, torch.Tensor] = {}
    known: Any = None
    names.reverse()
    while names:  # what is shared out is let go of at once
        aliases, parameter = names.pop()
        learns, value = parameter.requires_grad, parameter.detach()
        cast = value.to(dtype) if processes.main else _empty(value, dtype, processes)
        if processes.main and learns and cast is not value:
            before[aliases[0]] = value
        weight: Any = torch.nn.Parameter(cast, requires_grad=learns)
        for alias in aliases:
            _put(model, alias, weight)
        if known is None:
            holder = torch.nn.Module()
            holder.weight = weight
            zero.Init(module=holder, config_dict_or_path=config, dtype=dtype)
            known = weight
        else:
            known.convert_to_zero_parameters(param_list=[weight])
    return before


def _names(model: torch.nn.Module) -> list[tuple[list[str], torch.nn.Parameter]]:
    """Every parameter once, with all names that it has."""
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    return [(aliases[id(parameter)], parameter) for parameter in model.parameters()]


def _shapes(names: list[tuple[list[str], torch.nn.Parameter]]) -> list[tuple[Any, ...]]:
    return [(aliases, tuple(p.shape), p.requires_grad) for aliases, p in names]


def _differs(found: list[list[tuple[Any, ...]]]) -> str | None:
    for rank, other in enumerate(found):
        if other != found[0]:
            wrong = next((a, b) for a, b in zip(found[0], other, strict=False) if a != b)
            return f"process {rank} built another model than process 0: {wrong[1]} in place of {wrong[0]}"
    return None


def _empty(like: torch.Tensor, dtype: torch.dtype, processes: Processes) -> torch.Tensor:
    return torch.empty(like.shape, dtype=dtype, device=processes.device)


def _put(model: torch.nn.Module, name: str, value: Any) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, value)
