"""Which settings to change when a stage does not fit, cheapest first, each checked by planning again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lclm.train.settings import ActivationCheckpointing

if TYPE_CHECKING:
    from lclm.train.planning.plan import Planner, Proposal

SHAPE = ("positions", "rows", "latents")
Change = tuple[str, Callable[[Any], None]]


def propose(planner: Planner, name: str) -> Proposal:
    """The fewest changes found, in the order of what they cost, under which the stage fits."""
    from lclm.train.planning.plan import Proposal

    usable = planner.cluster.machine.usable

    def planned(changes: list[Change]) -> float:
        recipe = copy.deepcopy(planner.recipe)
        for _, change in changes:
            change(recipe)
        stage = recipe.stages[name]
        if (
            recipe.engine.offload_optimizer
            and (recipe.engine.zero if stage.zero is None else stage.zero) != 3
        ):
            return float("inf")  # the engine refuses it
        return planner.memory(name, recipe).total

    chosen: list[Change] = []
    for change in changes_for(planner.recipe, name):
        chosen.append(change)
        if planned(chosen) <= usable:
            break
    else:
        return Proposal([text for text, _ in chosen], planned(chosen) if chosen else 0.0, fits=False)
    for change in chosen[:-1]:
        fewer = [other for other in chosen if other is not change]
        if planned(fewer) <= usable:
            chosen = fewer
    return Proposal([text for text, _ in _last_of_each(chosen)], planned(chosen), fits=True)


def _last_of_each(changes: list[Change]) -> list[Change]:
    """Of several values of one setting, the last."""
    last = {text.split("=")[0]: (text, change) for text, change in changes}
    return list(last.values())


def changes_for(recipe: Any, stage_name: str) -> Iterator[Change]:
    """Settings that save memory in a stage, cheapest first: those that change no result come first."""
    stage, engine = recipe.stages[stage_name], recipe.engine
    for part in ("decoder", "encoder"):
        if not getattr(engine.activation_checkpointing, part) and (part == "decoder" or part in stage.learn):
            yield f"engine.activation_checkpointing.{part}=true", _checkpointing(part)
    if recipe.data.micro_batch > 1:
        yield "data.micro_batch=1", lambda recipe: setattr(recipe.data, "micro_batch", 1)
    zero = engine.zero if stage.zero is None else stage.zero
    key = "engine.zero" if stage.zero is None else f"stages.{stage_name}.zero"
    muon = any(settings.muon for settings in stage.learn.values())
    for level in (1, 2, 3) if not muon else ():
        if level > zero:
            yield f"{key}={level}", _zero(stage_name, level)
    if not engine.offload_optimizer and not muon:
        yield "engine.offload_optimizer=true", lambda r: setattr(r.engine, "offload_optimizer", True)
    pack = recipe.stage_data(stage_name).pack
    where = "data.pack" if stage.pack is None else f"stages.{stage_name}.pack"
    for fraction in (2, 4, 8):
        if pack.positions // fraction >= 256:
            shape = {name: max(1, getattr(pack, name) // fraction) for name in SHAPE}
            written = ", ".join(f"{name}: {value}" for name, value in shape.items())
            yield f"{where}={{{written}}}", _pack(stage_name, shape)


def _checkpointing(part: str) -> Callable[[Any], None]:
    def change(recipe: Any) -> None:
        before = recipe.engine.activation_checkpointing
        chosen = {"encoder": before.encoder, "decoder": before.decoder} | {part: True}
        recipe.engine.activation_checkpointing = ActivationCheckpointing(**chosen)

    return change


def _zero(name: str, level: int) -> Callable[[Any], None]:
    def change(recipe: Any) -> None:
        if recipe.stages[name].zero is None:
            recipe.engine.zero = level
        else:
            recipe.stages[name].zero = level

    return change


def _pack(name: str, shape: dict[str, int]) -> Callable[[Any], None]:
    def change(recipe: Any) -> None:
        pack = copy.copy(recipe.stage_data(name).pack)
        for key, value in shape.items():
            setattr(pack, key, value)
        recipe.stages[name].pack = pack

    return change
