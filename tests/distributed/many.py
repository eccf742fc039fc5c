"""Run by torchrun with a file of jobs: many small engines and runs, one after another in the same processes.

A job is {"do": name of a function here, ...its arguments}. Starting processes costs seconds, so that few
launches do all that the tests want.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from lclm.checkpoint import STATE, RunFolder, StageFolder, read_json
from lclm.recipe import load_recipe
from lclm.train import stages, trainer
from lclm.train.elastic import link_moments, restore_moved
from lclm.train.ends import Requeue
from lclm.train.engine import Engine
from lclm.train.optim import parameter_groups
from lclm.train.processes import leave_processes, start_processes
from lclm.train.saving import Identity, State, save_checkpoint
from lclm.train.settings import ComponentSettings, EngineSettings
from tests.train.toy import Toy, components

LEARN = {
    "encoder": ComponentSettings(lr=1e-2, weight_decay=0.1),
    "decoder": ComponentSettings(lr=3e-3, betas=[0.8, 0.9], weight_decay=0.2, eps=1e-7),
}


class Odd(Toy):
    """Weights that no number of processes divides, a group of 3 elements, a part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(8, 15)
        self.decoder = torch.nn.Linear(15, 3)
        self.frozen = torch.nn.Linear(3, 4)
        self.frozen.requires_grad_(False)


def odd_engine(zero: int, precision: str, seed: int, offload: bool = False) -> Engine:
    torch.manual_seed(0)
    model = Odd()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    settings = EngineSettings(zero=zero, precision=precision, offload_optimizer=offload)
    groups = parameter_groups(components(model), LEARN)
    processes = start_processes(settings)
    return Engine(model, groups, settings, processes, zero=zero, clip=1.0, micro_batch=2, accumulation=1)


def take_step(engine: Engine, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 8, generator=generator), torch.randn(2, 4, generator=generator)
    loss = engine.deepspeed(x.bfloat16() if engine.bf16 else x, y)
    engine.deepspeed.backward(loss)
    engine.deepspeed.step()


@torch.no_grad()
def state_of(engine: Engine) -> dict[str, Any]:
    """Masters, moments, low-precision copies and steps, whole. Collective."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero in (1, 2):
        link_moments(engine)
    state: dict[str, Any] = {f"fp32 {name}": value for name, value in engine.learned_weights().items()}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key).clone()
        with GatheredParameters([parameter], enabled=engine.zero == 3):
            state[f"copy {name}"] = parameter.detach().clone()
    state["steps"] = torch.tensor([float(value["step"]) for value in engine.base.state.values()]).unique()
    state["groups"] = [
        {key: group[key] for key in ("name", "lr", "betas", "weight_decay", "eps")}
        for group in engine.base.param_groups
    ]
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    wrong = [name for name in one.keys() & other.keys() if name != "groups"]
    wrong = [name for name in wrong if not torch.equal(one[name].flatten(), other[name].flatten())]
    return sorted([*wrong, *(one.keys() ^ other.keys()), *(["groups"] * (one["groups"] != other["groups"]))])


def identity(engine: Engine) -> Identity:
    precision = "bf16" if engine.bf16 else "fp32"
    return Identity("run", "frozen", engine.zero, precision, engine.processes.size)


def cut(folder: str, zero: int, precision: str, steps: int = 3, seed: int = 1) -> None:
    """Train the odd engine a little, save it, and write down all of it."""
    engine = odd_engine(zero, precision, seed)
    for number in range(steps):
        take_step(engine, number)
    save_checkpoint(engine, StageFolder(Path(folder)), State(stage_step=steps), identity(engine), keep=2)
    state = state_of(engine) if steps else {}
    if engine.processes.main:
        torch.save(state, Path(folder) / "state.pt")
    engine.close()


def cut_anew(folder: str, zero: int, precision: str, offload: bool = False) -> None:
    """Load what `cut` wrote into an engine of another start; everything must be as it was, bit for bit."""
    expected = torch.load(Path(folder) / "state.pt")
    path = StageFolder(Path(folder)).candidates()[0]
    engine = odd_engine(zero, precision, 2, offload)
    name = f"{folder} at {engine.processes.size} processes and ZeRO {zero}"
    assert identity(engine).check(path), f"{name} needs no cutting"
    said: list[str] = []
    restore_moved(engine, path, said.append)
    found = state_of(engine)
    if engine.processes.main:
        wrong = same(expected, found)
        assert not wrong, f"{name}: {wrong}"
        assert found["groups"][0]["betas"] != found["groups"][-1]["betas"]
    take_step(engine, 9)
    later = state_of(engine)
    assert later["steps"] == found["steps"] + 1
    engine.close()


def carry_on(recipe: str, source: str | None, target: str, zero: int) -> None:
    """Put the checkpoint of the run `source` into an engine at a ZeRO stage, and save that into the run
    `target` without a step; with no source, what the stage starts with."""
    loaded = load_recipe(recipe, [f"engine.zero={zero}", f"run_dir={target}"])
    (name, stage), *_ = loaded.stages.items()
    processes = start_processes(loaded.engine)
    engine, frozen = stages.build_engine(loaded, stage, None, processes)
    known, state = Identity("run", frozen, zero, loaded.engine.precision, processes.size), State(stage_step=2)
    if source is not None:
        path = RunFolder(Path(source)).stage(0, name).candidates()[0]
        known, state = (
            replace(known, run=read_json(path / STATE)["identity"]["run"]),
            State.read(path / STATE),
        )
        if known.check(path):
            restore_moved(engine, path, print)
        else:
            engine.load(path)
    save_checkpoint(engine, RunFolder(Path(target)).stage(0, name), state, known, keep=9)
    if processes.main:
        loaded.save(RunFolder(Path(target)).recipe)
    engine.close()


def hang_in_conversion(folder: str) -> None:
    """Begin to convert what `cut` wrote, and hang half way."""
    from deepspeed.checkpoint import ds_to_universal

    with mock.patch.object(ds_to_universal, "_save_optimizer_state", lambda *_: time.sleep(600)):
        cut_anew(folder, 3, "fp32")


def copy(source: str, target: str) -> None:
    """Copy a run's folder."""
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()


def train(recipe: str, settings: list[str], scramble: bool = False) -> None:
    """Train a recipe until it is complete or stops as asked."""
    with contextlib.suppress(Requeue), other_start() if scramble else contextlib.nullcontext():
        trainer.train(load_recipe(recipe, settings))


@contextlib.contextmanager
def other_start() -> Iterator[None]:
    """Engines start with other weights in all that learns: nothing but the checkpoint can restore it."""
    prepare = stages.prepare

    def prepared(model: Any, *arguments: Any) -> None:
        prepare(model, *arguments)
        generator = torch.Generator().manual_seed(99)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=generator)

    with mock.patch.object(stages, "prepare", prepared):
        yield


def main() -> None:
    """All jobs of a file."""
    start_processes(EngineSettings())
    for job in json.loads(Path(sys.argv[1]).read_text()):
        globals()[job.pop("do")](**job)
    leave_processes()


if __name__ == "__main__":
    main()
