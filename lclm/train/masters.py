"""The fp32 masters in a checkpoint's files, read one weight at a time.

The files are pickles that say where in them each tensor's bytes are; only those of one weight are read at a
time, whatever the size of the files. DeepSpeed's converter to universal checkpoints (see lclm.train.elastic)
holds whole files of a process, and writes both moments, too.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from lclm.train.engine import import_deepspeed

OPTIMIZER, MODEL = "_optim_states.pt", "_model_states.pt"
Files = dict[str, IO[bytes]]
"""The engine's files of a checkpoint, open, by name."""


@dataclass(frozen=True)
class Master:
    """A weight's fp32 master: its shape, and pieces of its values, in order: (file, first byte, elements)."""

    shape: torch.Size
    pieces: list[tuple[IO[bytes], int, int]]

    def read(self) -> Tensor:
        """All of it, on the CPU."""
        values = torch.empty(self.shape.numel())
        content, done = memoryview(values.numpy()).cast("B"), 0
        for file, offset, elements in self.pieces:
            file.seek(offset)
            done += file.readinto(content[done : done + 4 * elements])  # type: ignore[attr-defined]
        if done != len(content):
            raise ValueError(f"a weight of shape {tuple(self.shape)} is not whole in the checkpoint")
        return values.reshape(self.shape)


def find_masters(files: Files, groups: list[list[str]]) -> dict[str, Master]:
    """Where the masters of what learned are in the engine's files of a checkpoint, by name.

    groups: the names in each of the optimizer's parameter groups: at ZeRO 0 in bf16 their order tells them.
    """
    import_deepspeed()  # some of whose classes the pickles hold; no others are let in
    optimizers = [name for name in files if name.endswith(OPTIMIZER)]
    optimizers.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    first = min(name for name in files if name.endswith(MODEL))
    saved = _described(files[first])
    if not optimizers:
        return _unshared(saved, files[first], groups)
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in saved["param_shapes"]]
    found = {name: Master(shape, []) for group in shapes for name, shape in group.items()}
    for name in optimizers:
        state = _described(files[name])["optimizer_state_dict"]
        if "fp32_flat_groups" in state:
            cut = _cut_weights(state, shapes, optimizers.index(name), len(optimizers))
        else:
            cut = _cut_groups(state)
        for weight, offset, elements in cut:
            found[weight].pieces.append((files[name], offset, elements))
    return found


def _stage(kind: Any, name: str) -> Any:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r})")
    return ZeroStageEnum[name]


_STAGE: Any = (_stage, "builtins.getattr")
"""Python 3.11 before 3.11.4 pickles a member of an enumeration as getattr(class, name)."""


def _described(file: IO[bytes]) -> Any:
    """What was saved, with tensors that have no values but know their place in the file."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    file.seek(0)
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address, _STAGE]):
            return torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file.name} holds objects that no training checkpoint does: {error}") from error


def _offset(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    assert tensor.dtype == torch.float32 and tensor.is_contiguous(), "masters are fp32"
    return int(storage._checkpoint_offset) + 4 * tensor.storage_offset()


def _unshared(saved: Any, file: IO[bytes], groups: list[list[str]]) -> dict[str, Master]:
    """At ZeRO 0: the module's own weights in fp32, the optimizer's masters in bf16."""
    tensors = {name: saved["module"][name] for group in groups for name in group}
    if "fp32_groups" in saved["optimizer"]:
        pairs = zip(groups, saved["optimizer"]["fp32_groups"], strict=True)
        tensors = {name: value for names, group in pairs for name, value in zip(names, group, strict=True)}
    return {name: Master(t.shape, [(file, _offset(t), t.numel())]) for name, t in tensors.items()}


def _cut_groups(state: Any) -> Iterable[tuple[str, int, int]]:
    """At ZeRO 1 and 2 each parameter group is cut; a process has a run of each, and says what is in it."""
    shares = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
    for share, mapping in shares:
        for name, place in mapping.items():
            yield name, _offset(share) + 4 * place.start, place.numel


def _cut_weights(
    state: Any, shapes: list[dict[str, torch.Size]], rank: int, size: int
) -> Iterable[tuple[str, int, int]]:
    """At ZeRO 3 each weight is cut into equal shares, the last of them padded."""
    for flat, group in zip(state["fp32_flat_groups"], shapes, strict=True):
        offset = _offset(flat)
        for name, shape in group.items():
            share = -(-shape.numel() // size)
            yield name, offset, max(0, min(share, shape.numel() - rank * share))
            offset += 4 * share
