"""Weights to safetensors files as `save_pretrained` names and splits them, one file's in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lclm.stored import INDEX, Read

SHARD = "4GB"
"""How much a file holds unless asked otherwise: as much as is in memory at once."""
Tell = Callable[[int], None]
"""Hears how many bytes of weights were written since the last time."""


class Weight(NamedTuple):
    """A tensor of a file: its name there, and how to get it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


def list_weights(model: Any, read: Read) -> list[Weight]:
    """What `save_pretrained` writes of a model, in its order, without values.

    model: on any device, the meta one too. read(name): a weight of its state dict. ValueError for a model of
    which files hold weights that several of the model's make up.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    state = remove_tied_weights_from_state_dict(state, model)
    files = revert_weight_conversion(model, dict(state))
    if files.keys() == state.keys():
        return [
            Weight(name, value.shape, value.dtype, reader(read, name, value)) for name, value in files.items()
        ]
    origins = {
        there: name
        for name, value in state.items()
        for there, part in revert_weight_conversion(model, {name: value}).items()
        if there in files and part.shape == files[there].shape
    }
    if odd := sorted(files.keys() - origins.keys()):
        raise ValueError(
            f"{odd[0]} is made of several weights of {type(model).__name__}, which are not read one by one; "
            "load the model and use its save_pretrained"
        )
    last: dict[str, dict[str, Tensor]] = {}

    def read_part(there: str) -> Tensor:
        name = origins[there]
        if name not in last:  # a merged weight is read once for all of its parts, which follow one another
            last.clear()
            last[name] = revert_weight_conversion(model, {name: reader(read, name, state[name])()})
        return last[name][there]

    return [
        Weight(there, value.shape, value.dtype, partial(read_part, there)) for there, value in files.items()
    ]


def reader(read: Read, name: str, expected: Tensor) -> Callable[[], Tensor]:
    """Reads a weight in the dtype in which it is to be written."""

    def value() -> Tensor:
        found = read(name).to(expected.dtype)
        assert found.shape == expected.shape, f"{name} was read as {tuple(found.shape)}"
        return found

    return value


def size(weights: Sequence[Weight]) -> int:
    """Bytes of all of them."""
    return sum(weight.shape.numel() * weight.dtype.itemsize for weight in weights)


def write_shards(
    folder: Path, weights: Sequence[Weight], *, shard_size: int | str, parameters: int, tell: Tell
) -> None:
    """Write weights into `folder`, with an index if they fill several files.

    shard_size: bytes, or "4GB"; a larger weight has a file of its own. parameters: how many the index names.
    Raises OSError when the disk is full.
    """
    named = {weight.name: weight for weight in weights}
    split = split_torch_state_dict_into_shards(
        {w.name: torch.empty(w.shape, dtype=w.dtype, device="meta") for w in weights},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, [named[name] for name in names], {"format": "pt"}, tell)
    if split.is_sharded:
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def write_tensors(path: Path, weights: Sequence[Weight], metadata: dict[str, str] | None, tell: Tell) -> None:
    """One file, all of which is in memory. Raises OSError when the disk is full."""
    tensors = {weight.name: weight.read().contiguous() for weight in weights}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # what it makes of an OSError
        raise OSError(str(error)) from error
    tell(size(weights))
