"""The model of a training checkpoint of any ZeRO stage and number of processes, read a weight at a time.

What learned is in the checkpoint (lclm.train.masters), what was frozen in the stage's start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lclm.checkpoint import (
    STATE,
    RunFolder,
    StageFolder,
    changed,
    damage,
    read_json,
    weights_fingerprint,
)
from lclm.settings import unknown_name
from lclm.stored import Read, StoredModel, Tensors, aliases, in_memory, match, open_stored
from lclm.train.engine import TAG
from lclm.train.masters import Files, find_masters
from lclm.train.optim import embedding_ids, parameter_groups
from lclm.train.stages import prepare, start_model, start_processor, start_settings

Say = Callable[[str], None]


def open_checkpoint(
    recipe: Any, run: RunFolder, *, stage: str | None = None, step: int | None = None, say: Say = print
) -> StoredModel:
    """The model as a training checkpoint has it, equal to the export that training would write of it.

    recipe: the run's. stage: the last one that was begun if None. step: of the stage; the newest checkpoint
    that is whole if None. Nothing is written into the run. Raises ValueError when there is no such
    checkpoint, it is damaged, or the frozen weights are not those it was trained with.
    """
    index, name = _begun(recipe, run, stage)
    folder = run.stage(index, name)
    start = run.stage(index - 1, list(recipe.stages)[index - 1]).export if index else None
    if folder.done.is_file() and step is None:
        say(f"stage {name} is complete: exporting what it ended with")
        wrong = changed(folder.export, read_json(folder.done).get("export", {}))
        if wrong:
            raise ValueError(f"the export of a complete stage is damaged: {wrong}. Put it back from a copy")
        return open_stored(folder.export)
    saved = _whole_checkpoint(folder, step, say)
    say(f"exporting {saved.path.name} of stage {name}")
    recipe = copy.deepcopy(recipe)
    recipe.model.attention = "sdpa"  # weights need no kernel, nor a machine that has one
    return _open(recipe, recipe.stages[name], start, saved, say)


@dataclass(frozen=True)
class Saved:
    """A checkpoint, its files, open, as a run may remove it meanwhile, and the print of what was frozen."""

    path: Path
    files: Files
    frozen: str


def _begun(recipe: Any, run: RunFolder, stage: str | None) -> tuple[int, str]:
    """(index, name) of a stage, of the last one that has something if None."""
    names = list(recipe.stages)
    if stage is not None:
        if stage not in names:
            raise ValueError(f"{run.path}: {unknown_name('stage', stage, names)}")
        return names.index(stage), stage
    for index, name in reversed(list(enumerate(names))):
        folder = run.stage(index, name)
        if folder.candidates() or folder.done.is_file():
            return index, name
    raise ValueError(f"{run.path}: there is no checkpoint yet; train it until the first is written")


def _whole_checkpoint(folder: StageFolder, step: int | None, say: Say) -> Saved:
    """A checkpoint whose files are what was written: that of `step`, or the newest."""
    there = folder.candidates()
    if step is not None and folder.checkpoint(step) not in there:
        steps = sorted(int(path.name.rpartition("-")[2]) for path in there)
        if not steps:
            raise ValueError(
                f"{folder.path} holds no checkpoints: a complete stage has its export only; leave --step out"
            )
        nearest = min(steps, key=lambda other: abs(other - step))
        raise ValueError(
            f"{folder.path} holds no checkpoint of step {step}; the nearest is {nearest}. There are: "
            + ", ".join(str(other) for other in steps)
        )
    for path in there if step is None else [folder.checkpoint(step)]:
        say(f"verifying {path.name}")
        found = _verify(path)
        if isinstance(found, Saved):
            return found
        if step is not None:
            raise ValueError(f"the checkpoint is damaged and is not exported: {found}. Name another --step")
        if not path.exists():
            say(f"the run went on and removed {path.name}")
            return _whole_checkpoint(folder, step, say)
        say(f"checkpoint {path.name} is damaged and is not used: {found}")
    raise ValueError(f"{folder.path} holds no checkpoint that is whole; train on until the next is written")


def _verify(path: Path) -> Saved | str:
    """An opened checkpoint, or what is wrong with it."""
    try:
        files: Files = {file.name: file.open("rb") for file in (path / TAG).glob("*.pt")}
        wrong = damage(path)
        return wrong or Saved(path, files, read_json(path / STATE)["identity"]["frozen"])
    except FileNotFoundError as error:
        return f"{error.filename} is missing"


def _open(recipe: Any, stage: Any, start: Path | None, saved: Saved, say: Say) -> StoredModel:
    from lclm.model.build import build_empty, components

    model = build_empty(start_settings(recipe, start))
    trained = copy.deepcopy(model)
    prepare(trained, stage, recipe.engine.activation_checkpointing)
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    groups = parameter_groups(components(trained), stage.learn, embedding_ids(trained))
    learned = find_masters(saved.files, [[names[id(p)] for p in group["params"]] for group in groups])
    frozen = {name: _plain(name) for name, p in trained.named_parameters() if not p.requires_grad}
    learning = names.values() - frozen.keys()
    if learned.keys() != learning:
        wrong = sorted(learned.keys() ^ learning)
        raise ValueError(
            f"{saved.path} does not fit its stage: {len(wrong)} weights differ from those that learn, for "
            f"example {', '.join(wrong[:3])}; was it written by another recipe?"
        )
    same = aliases(model)
    needed = {name for name in same if not learned.keys() & set(same[name])}
    begun = _at_start(recipe, start, model, needed, say)
    if frozen:
        say(f"comparing {len(frozen):,} frozen weights with those it was trained on")
    _check_frozen(saved, {name: partial(_in_fp32, begun, plain) for name, plain in frozen.items()})
    layers = _lora_layers(trained)

    def read(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf == "weight":
            return _merged(layers[path], path, lambda inner: read_trained(f"{path}.{inner}"))
        return read_trained(name)

    def read_trained(name: str) -> Tensor:
        known = [other for other in same.get(name, [name]) if other in learned]
        return learned[known[0]].read() if known else begun(_plain(name))

    return StoredModel(model, start_processor(recipe, start), read)


def _plain(name: str) -> str:
    """A frozen weight's name in the model without LoRA."""
    return name.replace(".base_layer.", ".")


def _in_fp32(read: Read, name: str) -> Tensor:
    return read(name).float()


def _check_frozen(saved: Saved, frozen: Mapping[str, Callable[[], Tensor]]) -> None:
    if weights_fingerprint(frozen.items()) != saved.frozen:
        raise ValueError(
            f"{saved.path}: the frozen weights that its stage starts from are not those it was trained on; "
            "restore the files that `model` names, or the export of the stage before"
        )


def _lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Layers with LoRA, by their place in the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def _merged(layer: Any, path: str, read: Read) -> Tensor:
    """A layer's weight with its LoRA product, as `merge_lora` adds it."""
    real = copy.deepcopy(layer).to_empty(device="cpu")
    for name, parameter in real.named_parameters():
        parameter.copy_(read(name))
    real.merge()
    merged: Tensor = real.get_base_layer().weight.detach()
    return merged


def _at_start(recipe: Any, start: Path | None, model: Any, needed: set[str], say: Say) -> Read:
    """Reads the weights `needed` as the stage starts with them."""
    source = start or (recipe.model.init_from and _fetched(recipe.model.init_from))
    if source:
        return open_stored(Path(source)).read
    read = _from_parts(recipe.model, model, needed)
    if read is None:
        say("the frozen weights are not read one by one: they are built in memory, as training builds them")
        return in_memory(start_model(recipe, None), None).read
    return read


def _from_parts(settings: Any, model: Any, needed: Iterable[str]) -> Read | None:
    """Reads weights of the recipe's encoder and decoder; None where training makes some itself."""
    from lclm.model.sources import find

    by_part: dict[str, list[str]] = {}
    for name in needed:
        part, _, rest = name.partition(".")
        by_part.setdefault(part, []).append(rest)
    places: dict[str, tuple[Tensors, str]] = {}
    for part, names in by_part.items():
        path = getattr(settings, part).path if part in ("encoder", "decoder") else None
        source = find(path) if path else None
        if source is None or source.gguf:
            return None
        try:
            tensors = Tensors.of(_fetched(source.name))
        except ValueError:
            return None
        found = match(tensors, getattr(model, part), names)
        if len(found) < len(names):
            return None
        places |= {f"{part}.{name}": (tensors, there) for name, there in found.items()}

    def read(name: str) -> Tensor:
        tensors, there = places[name]
        return tensors.read(there)

    return read


def _fetched(path: str) -> Path:
    """The folder of a checkpoint, brought from the Hub if it is not one here."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path))
