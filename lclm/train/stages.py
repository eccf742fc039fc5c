"""What a stage does to a model: its start, freezing, LoRA, activation checkpointing, the engine around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lclm.checkpoint import weights_fingerprint
from lclm.train.engine import Engine, spread_out
from lclm.train.optim import embedding_ids, parameter_groups
from lclm.train.processes import Processes
from lclm.train.settings import (
    ActivationCheckpointing,
    CompileSettings,
    ComponentSettings,
    LoraSettings,
    StageSettings,
)

ADAPTER = "lora"
"""The name of LoRA's weights inside the model while a stage trains them."""


def prepare(model: Any, stage: StageSettings, checkpointing: ActivationCheckpointing) -> None:
    """Freeze what does not learn, add LoRA where asked for, switch activation checkpointing on. In place.

    Raises ValueError when a component has nothing that can learn, or LoRA's targets name no module of it.
    """
    from lclm.model.build import components

    for name, parameters in components(model).items():
        settings = stage.learn.get(name)
        for _, parameter in parameters:
            parameter.requires_grad_(settings is not None and settings.lora is None)
    add_lora(model, stage.learn)
    for name in stage.learn:
        if not any(parameter.requires_grad for _, parameter in components(model)[name]):
            raise ValueError(f"stage.learn names {name}, but this model has no {name} weights; remove it")
    for name in ("encoder", "decoder"):
        # transformers' checkpointing sends gradients through a component that nothing in it needs
        if getattr(checkpointing, name) and (name == "decoder" or name in stage.learn):
            getattr(model, name).gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )


def compile_blocks(model: Any, settings: CompileSettings) -> None:
    """Have torch compile the blocks of each component that asks for it; blocks of a kind share the code.

    In place; names of weights stay. Raises ValueError where a component has no blocks that can be told apart.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for name in ("encoder", "decoder"):
        if not getattr(settings, name):
            continue
        component = getattr(model, name)
        blocks = [module for module in component.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise ValueError(
                f"engine.compile.{name}: {type(component).__name__} does not mark its blocks; turn it off"
            )
        for block in blocks:
            block.compile()


def add_lora(model: Any, learn: Mapping[str, ComponentSettings]) -> None:
    """Put trainable low-rank additions into each component that asks for them; its own weights are frozen."""
    for name, settings in learn.items():
        if settings.lora is not None:
            _inject(getattr(model, name, None), name, settings.lora)


def _inject(component: torch.nn.Module | None, name: str, lora: LoraSettings) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    modules = dict(component.named_modules()) if component is not None else {}
    linear = {
        path.rsplit(".", 1)[-1] for path, module in modules.items() if isinstance(module, torch.nn.Linear)
    }
    found = [target for target in lora.targets if target in linear]
    if component is None or not found:
        raise ValueError(
            f"learn.{name}.lora.targets {lora.targets} name no linear layer of the {name}; "
            f"it has: {', '.join(sorted(linear)) or 'none'}"
        )
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=found)
    inject_adapter_in_model(config, component, adapter_name=ADAPTER)


def merge_lora(model: torch.nn.Module) -> None:
    """Add LoRA's products to the weights they belong to and leave plain layers behind. In place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in layers:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())


def start_settings(recipe: Any, start: Path | None) -> Any:
    """The model's settings of a stage that starts from the export `start`, or of the first one (None)."""
    if start is None:
        return recipe.model
    model = recipe.model
    return type(model)(
        init_from=str(start), attention=model.attention, max_rows_per_forward=model.max_rows_per_forward
    )


def start_model(recipe: Any, start: Path | None) -> Any:
    """The model that a stage starts from, in fp32 on the CPU; equal on every process."""
    from transformers.utils import logging

    from lclm.model.build import build_model

    logging.disable_progress_bar()
    return build_model(start_settings(recipe, start), dtype=torch.float32, device="cpu", seed=recipe.seed)


def start_processor(recipe: Any, start: Path | None) -> Any:
    """The processor that belongs to `start_model`."""
    from lclm.model.build import build_processor

    return build_processor(start_settings(recipe, start))


def build_engine(
    recipe: Any, stage: StageSettings, start: Path | None, processes: Processes
) -> tuple[Engine, str]:
    """A stage's engine at its start, and the fingerprint of the weights that are frozen in it. Collective.

    At ZeRO 3 with several processes only the main one reads the weights; the others get their shares.
    """
    from lclm.model.build import build_empty, components

    zero = recipe.engine.zero if stage.zero is None else stage.zero
    spread = zero == 3 and processes.size > 1
    error = None
    try:
        if processes.main or not spread:
            model = start_model(recipe, start)
        else:
            model = build_empty(start_settings(recipe, start))
    except ValueError as problem:
        error = str(problem)
    processes.agree(error)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # LoRA's first weights, too, are a function of the recipe
        prepare(model, stage, recipe.engine.activation_checkpointing)
    compile_blocks(model, recipe.engine.compile)
    frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    fingerprint = processes.gather(weights_fingerprint(frozen) if processes.main else "")[0]
    del frozen  # it would keep whole weights
    config = {
        "zero": zero,
        "clip": stage.clip,
        "micro_batch": recipe.data.micro_batch,
        "accumulation": recipe.data.accumulation(processes.size),
    }
    masters = spread_out(model, recipe.engine, processes, config) if spread else None
    groups = parameter_groups(components(model), stage.learn, embedding_ids(model))
    engine = Engine(model, groups, recipe.engine, processes, masters=masters, **config)
    return engine, fingerprint
