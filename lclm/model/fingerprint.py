"""What identifies a model's weights, part by part, whatever precision they are loaded in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

COMPONENTS = ("encoder", "adapter", "decoder", "brackets")
_PART = {"block_position": "encoder"}
_AT_ONCE = 1 << 24


class Fingerprint:
    """SHA-256 of weights, one for each component (the encoder's with the position-in-block embedding).

    Over names, shapes and values rounded to bfloat16, in any order: a checkpoint has the same one in float32
    and in bfloat16, and a writer can feed it one tensor at a time. A tied tensor is added once, under the
    decoder's name, as a checkpoint file holds it.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, str]] = {component: {} for component in COMPONENTS}

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor of the model's state dict (`encoder.layers.0...`). ValueError for a name of no component,
        one that was added before, and a tensor without values (on the meta device)."""
        self._put(name, _digest(name, tensor))

    def _put(self, name: str, digest: str) -> None:
        part = name.partition(".")[0]
        tensors = self._tensors.get(_PART.get(part, part))
        if tensors is None:
            raise ValueError(f"{name!r} is no weight of an LCLM: it starts with none of {COMPONENTS}")
        if name in tensors:
            raise ValueError(f"{name!r} was added to the fingerprint twice")
        tensors[name] = digest

    def digests(self) -> dict[str, str]:
        """{component: SHA-256 in hex}, of what was added so far."""
        return {
            component: hashlib.sha256("".join(tensors[name] for name in sorted(tensors)).encode()).hexdigest()
            for component, tensors in self._tensors.items()
        }


def fingerprints(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """The fingerprint of each component of an LCLM.

    state_dict: the weights if they are not in the model (gathered from a sharded engine, read from a file one
    by one); of tied ones, one is enough. ValueError when it lacks some.
    """
    stored = list(_stored(model))
    if state_dict is not None:
        for name, same, _ in stored:
            if not any(other in state_dict for other in same):
                raise ValueError(f"the weights lack {name!r}")

    def digest(name: str, same: list[str], value: Tensor) -> str:
        if state_dict is not None:
            value = state_dict[next(other for other in same if other in state_dict)]
        return _digest(name, value)

    found = Fingerprint()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for (name, _, _), made in zip(stored, threads.map(lambda item: digest(*item), stored), strict=True):
            found._put(name, made)
    return found.digests()


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint's safetensors files under a model's names, each read when asked for.

    source: a folder or Hub id, in the native or the released layout. names: of the model's tensors; others in
    the files are left out.
    """

    def __init__(self, source: str, names: set[str], revision: str | None = None) -> None:
        folder = Path(source)
        if source and not folder.is_dir():
            folder = Path(snapshot_download(source, revision=revision, allow_patterns="*.safetensors"))
        self._files: dict[str, tuple[Path, str]] = {}
        for part in ("", "encoder", "decoder", "adapter") if source else ():
            for path in sorted((folder / part).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        for name in (f"{part}.{key}".lstrip("."), f"{part}.{key.partition('.')[2]}"):
                            if name in names:
                                self._files.setdefault(name, (path, key))

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._files[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _stored(model: nn.Module) -> Iterator[tuple[str, list[str], Tensor]]:
    """(name that counts, all names, value) of every tensor of a model, each once: the decoder's name if it
    has one."""
    values: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        values[id(value)] = value
        names.setdefault(id(value), []).append(name)
    for number, same in names.items():
        yield next((name for name in same if name.startswith("decoder.")), same[0]), same, values[number]


def _digest(name: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values; load the weights first")
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE].to(torch.bfloat16).cpu().contiguous()
        digest.update(memoryview(part.view(torch.uint8).numpy()))
    return digest.hexdigest()
