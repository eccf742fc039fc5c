"""Checkpoints on the disk as models without weights, whose weights are read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class StoredModel:
    """An LCLM whose tensors need no values, in the dtypes of the stored ones; its processor; its weights.

    read(name): a weight of `model.state_dict()`, by any of its names, on the CPU.
    """

    model: Any
    processor: Any
    read: Read


class Tensors:
    """The tensors of safetensors files by name. Their headers are read at once, a tensor when asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """ValueError names a file that is missing or damaged."""
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in files:
            with _Reading(path):
                file: Any = safe_open(path, framework="pt", backend="pread")  # mapped pages would stay
                self._files |= dict.fromkeys(file.keys(), (path, file))

    @classmethod
    def of(cls, folder: Path) -> Tensors:
        """Those of a transformers checkpoint. ValueError when it has no safetensors, or not all."""
        if not (folder / INDEX).is_file():
            if not (folder / SINGLE).is_file():
                raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")
            return cls([folder / SINGLE])
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / file for file in listed.values()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error})") from None
        found = cls(files)
        if missing := listed.keys() - found._files.keys():
            raise ValueError(f"{folder / INDEX} lists {min(missing)!r}, which is in none of its files")
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, from the header."""
        path, file = self._files[name]
        stored = file.get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(f"{path}: {name!r} is stored as {stored}, which no weight of an LCLM is")
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        path, file = self._files[name]
        with _Reading(path):
            return file.get_tensor(name)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


class _Reading:
    """Errors of a safetensors file name it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (SafetensorError, OSError)):
            raise ValueError(f"{self._path} cannot be read ({error}); put it back from a copy") from error


def aliases(model: Any) -> dict[str, list[str]]:
    """All names of each tensor in a model's state dict, by each of them; several where weights are tied."""
    groups: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        groups.setdefault(id(value), []).append(name)
    return {name: groups[id(value)] for name, value in state.items()}


def match(tensors: Tensors, part: Any, names: Iterable[str]) -> dict[str, str]:
    """{name in the model `part`: name in the files} for those of `names` that the files hold in its shape.

    A tied weight may be there under any of its names. A checkpoint of the bare model lacks the prefix of the
    names, or has one too many.
    """
    prefix, same = f"{part.base_model_prefix}.", aliases(part)
    state = part.state_dict()
    found: dict[str, str] = {}
    for name in names:
        for known in [name, *same[name]]:
            for spelled in (known, prefix + known, known.removeprefix(prefix)):
                if spelled in tensors and tensors.shape(spelled) == tuple(state[name].shape):
                    found.setdefault(name, spelled)
    return found


def open_stored(folder: Path) -> StoredModel:
    """A checkpoint in the native or the released layout, in a folder. ValueError when it is none, or damaged.

    One whose names transformers changes as it loads them (experts that are merged) is loaded whole.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    from lclm.model import LCLMForConditionalGeneration, LCLMProcessor
    from lclm.model.build import ModelSettings, build_empty
    from lclm.model.layouts import read_marks, released_folder

    released = released_folder(folder) is not None
    if not released and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has neither config.json nor model_config.json")
    model = build_empty(ModelSettings(init_from=str(folder), attention="sdpa"))
    processor = LCLMProcessor.from_pretrained(folder)
    places = _released(folder, model) if released else _within(Tensors.of(folder), model)
    missing = [name for name in model.state_dict() if name not in places]
    if missing and get_model_conversion_mapping(model, add_legacy=False):
        return in_memory(LCLMForConditionalGeneration.from_pretrained(folder, dtype="auto"), processor)
    if missing:
        raise ValueError(f"{folder} does not hold {missing[0]} in the shape that its configuration says")
    _take_dtypes(model, places)
    rows, own = list(model.brackets.ids), read_marks(folder) if released else None

    def read(name: str) -> Tensor:
        tensors, there = places[name]
        value = tensors.read(there)
        if released and name == BRACKETS:
            return value[rows]
        if own is not None and places[name] == places[BRACKETS]:
            value[rows] = own.to(value)
        return value

    return StoredModel(model, processor, read)


def in_memory(model: Any, processor: Any) -> StoredModel:
    """A model that was loaded or built whole."""
    weights = model.state_dict()
    return StoredModel(model, processor, weights.__getitem__)


Places = dict[str, tuple[Tensors, str]]
BRACKETS = "brackets.weight"


def _within(tensors: Tensors, part: Any, prefix: str = "") -> Places:
    found = match(tensors, part, part.state_dict())
    return {prefix + name: (tensors, there) for name, there in found.items()}


def _released(folder: Path, model: Any) -> Places:
    """Where each weight is in the released layout; the brackets are rows of the decoder's embeddings."""
    from lclm.model.layouts import ADAPTER

    adapter = Tensors([folder / ADAPTER])
    places: Places = {
        f"adapter.{name}": (adapter, name)
        for name, value in model.adapter.state_dict().items()
        if name in adapter and adapter.shape(name) == tuple(value.shape)
    }
    for component in ("encoder", "decoder"):
        tensors = Tensors.of(folder / component)
        places |= _within(tensors, getattr(model, component), f"{component}.")
    table = model.decoder.get_input_embeddings().weight
    name = next(n for n, value in model.decoder.named_parameters() if value is table)
    if f"decoder.{name}" in places:
        places[BRACKETS] = places[f"decoder.{name}"]
    return places


def _take_dtypes(model: Any, places: Places) -> None:
    """Give tensors on the meta device the dtypes of stored ones, and the configurations their models'."""
    for name, value in model.state_dict(keep_vars=True).items():
        tensors, there = places[name]
        value.data = value.data.to(tensors.dtype(there))
    config = model.config
    config.encoder_config.dtype = model.encoder.dtype
    config.dtype = config.decoder_config.dtype = model.decoder.dtype
