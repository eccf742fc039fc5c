"""Artifacts: compressed contexts in files, read later by a decoder without the encoder.

One safetensors file, `.lclm`: the tensors `latents`, `starts` and `windows`, and a header in the metadata,
whose first entry is the SHA-256 of the whole file with the digest's own 64 characters taken as zeros.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from .fingerprint import COMPONENTS

SCHEMA = 1
SUFFIX = ".lclm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GEOMETRY = {"window": int, "overlap": int, "pooling": str, "attention": str}
_KEY = "lclm_artifact"
_MOST_NAME = 4096
_SURROGATE = re.compile("[\ud800-\udfff]")
_ZEROS = "0" * 64
_HEX = re.compile("[0-9a-f]{64}")
_BEGIN = json.dumps({"__metadata__": {_KEY: '{"sha256":"'}}, separators=(",", ":"))[:-3].encode()
_DIGEST = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + 64)
_MOST_TEXT = 16 << 20
_MOST_HEADER = 2 * _MOST_TEXT + 4096


@dataclass(frozen=True)
class Compressed:
    """One memory of an artifact.

    name: what its source is called. sha256: of the source text in UTF-8, in hex. characters, tokens (of the
    encoder): the source's length. latents: ceil(tokens / ratio). licence: of the source, if it was given.
    ValueError for what cannot be.
    """

    name: str
    sha256: str
    characters: int
    tokens: int
    latents: int
    ratio: int
    licence: str | None = None

    def __post_init__(self) -> None:
        if problem := _wrong(self):
            raise ValueError(problem)


@dataclass(frozen=True, eq=False)
class Artifact:
    """Latents of one or more memories, and what they were made of and by.

    latents: [M, K], in the model's dtype. memories: in order. starts: int64 [M], the character of its source
    at which each latent's block begins. windows: uint8 [windows, 32], a digest of every window's row tokens.
    fingerprints: {component: SHA-256} of the model. geometry: its window, overlap, pooling and attention.
    ValueError for parts that do not fit together.
    """

    latents: Tensor
    memories: tuple[Compressed, ...]
    starts: Tensor
    windows: Tensor
    fingerprints: dict[str, str]
    geometry: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "memories", tuple(self.memories))
        if problem := _problem(self):
            raise ValueError(f"this is no artifact: {problem}")

    def __len__(self) -> int:
        """How many memories it holds."""
        return len(self.memories)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Latents of each memory."""
        return tuple(memory.latents for memory in self.memories)

    def select(self, memories: int | Sequence[int]) -> Artifact:
        """An artifact of some of the memories, by number, in the order given. ValueError for a number that
        there is not."""
        wanted = [memories] if isinstance(memories, int) else list(memories)
        if not wanted or not all(-len(self) <= number < len(self) for number in wanted):
            raise ValueError(f"cannot select the memories {wanted} of an artifact that holds {len(self)}")
        latents = self.latents.split(self.sizes)
        starts = self.starts.split(self.sizes)
        windows = self.windows.split([_windows_of(memory, self.geometry) for memory in self.memories])
        return Artifact(
            torch.cat([latents[number] for number in wanted]),
            tuple(self.memories[number] for number in wanted),
            torch.cat([starts[number] for number in wanted]),
            torch.cat([windows[number] for number in wanted]),
            self.fingerprints,
            self.geometry,
        )

    @staticmethod
    def concatenate(artifacts: Iterable[Artifact]) -> Artifact:
        """The memories of several artifacts of one model, one after another, as if compressed together.

        Latents of different precision get the wider one. ValueError, naming what differs, for artifacts of
        different models.
        """
        parts = list(artifacts)
        if not parts:
            raise ValueError("there is no artifact to concatenate")
        for number, part in enumerate(parts[1:], 2):
            if reason := part.differs(parts[0].fingerprints, parts[0].geometry):
                raise ValueError(f"artifact {number} cannot be joined with the first: {reason}")
        dtype = parts[0].latents.dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.latents.dtype)
        return Artifact(
            torch.cat([part.latents.to(dtype) for part in parts]),
            tuple(memory for part in parts for memory in part.memories),
            torch.cat([part.starts for part in parts]),
            torch.cat([part.windows for part in parts]),
            parts[0].fingerprints,
            parts[0].geometry,
        )

    def differs(self, fingerprints: dict[str, str], geometry: dict[str, Any]) -> str | None:
        """In what way this was made by another model than that of `fingerprints` and `geometry`; None if it
        was not."""
        for component in COMPONENTS:
            if self.fingerprints[component] != fingerprints[component]:
                own, other = self.fingerprints[component][:12], fingerprints[component][:12]
                return f"it was made with another {component} (fingerprint {own}…, here {other}…)"
        for name in GEOMETRY:
            if self.geometry[name] != geometry[name]:
                return f"it was made with {name} {self.geometry[name]!r}, here it is {geometry[name]!r}"
        return None

    def save(self, path: Any) -> None:
        """Write it to a file, whole or not at all, in place of an older one. ValueError when the header would
        be over 16 MiB."""
        path = Path(path)
        header = {
            "schema": SCHEMA,
            "fingerprints": self.fingerprints,
            "geometry": self.geometry,
            "memories": [asdict(memory) for memory in self.memories],
        }
        text = f'{{"sha256":"{_ZEROS}",{json.dumps(header)[1:]}'
        if len(text) > _MOST_TEXT:
            raise ValueError(f"{path}: {len(self):,} memories are too many for one artifact; make several")
        tensors = {"latents": self.latents, "starts": self.starts, "windows": self.windows}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
        try:
            save_file(tensors, beside, {_KEY: text})
            _seal(beside)
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Any) -> Artifact:
        """Read a file of `save`. ValueError, with the reason, when it is no artifact, was damaged, or is of a
        newer version; OSError when it cannot be read."""
        path = Path(path)
        with path.open("rb") as file:
            data = file.read(_DIGEST.stop)
            if data[8 : _DIGEST.start] != _BEGIN or len(data) < _DIGEST.stop:
                raise ValueError(f"{path} is no artifact, or the start of it is damaged")
            file.seek(0)
            data = file.read()
        if _digest(data) != data[_DIGEST]:
            raise ValueError(
                f"{path} is damaged: its content is not what was written (SHA-256 differs); copy it again, "
                "or compress its sources again"
            )
        try:
            return cls(**_read(data))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _digest(data: bytes) -> bytes:
    digest = hashlib.sha256(data[: _DIGEST.start])
    digest.update(_ZEROS.encode())
    digest.update(memoryview(data)[_DIGEST.stop :])
    return digest.hexdigest().encode()


def _seal(path: Path) -> None:
    """Write the file's digest into its place, and wait until it is on the disk."""
    with path.open("r+b") as file:
        assert file.read(_DIGEST.start)[8:] == _BEGIN, "safetensors writes metadata first"
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(_DIGEST.start)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _read(data: bytes) -> dict[str, Any]:
    """Arguments of Artifact from a file's content, whose digest is right. ValueError for what is wrong."""
    size = int.from_bytes(data[:8], "little")
    if size > min(_MOST_HEADER, len(data) - 8):
        raise ValueError(f"its header claims {size:,} bytes")
    try:
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_KEY])
        schema = header.pop("schema")
        del header["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}: {error})") from None
    if not _whole(schema) or schema > SCHEMA:
        raise ValueError(
            f"it has the schema {str(schema)[:20]}, but this version of lclm reads up to {SCHEMA}; get a "
            "newer lclm"
        )
    if set(header) != {"fingerprints", "geometry", "memories"}:
        raise ValueError(f"its header holds {', '.join(map(str, sorted(header)))[:200]}")
    try:
        memories = tuple(Compressed(**memory) for memory in header["memories"])
        tensors = load(data)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"it cannot be read ({type(error).__name__}: {str(error)[:200]})") from None
    if set(tensors) != {"latents", "starts", "windows"}:
        raise ValueError(f"it holds the tensors {', '.join(sorted(tensors))[:200]}")
    return {**tensors, **header, "memories": memories}


def _problem(artifact: Artifact) -> str | None:
    """What is wrong with an artifact's parts, None if nothing."""
    prints, geometry, memories = artifact.fingerprints, artifact.geometry, artifact.memories
    if not isinstance(prints, dict) or set(prints) != set(COMPONENTS) or not all(map(_hex, prints.values())):
        return f"fingerprints must be SHA-256 digests of {', '.join(COMPONENTS)}"
    if not isinstance(geometry, dict) or set(geometry) != set(GEOMETRY):
        return f"geometry must have {', '.join(GEOMETRY)}"
    for name, kind in GEOMETRY.items():
        if not (isinstance(geometry[name], str) if kind is str else _whole(geometry[name])):
            return f"its geometry's {name} is {str(geometry[name])[:40]!r}"
    if geometry["window"] < 1 or not memories:
        return "it has no memory" if not memories else "its window is 0"
    if not all(isinstance(memory, Compressed) for memory in memories):
        return "its memories are not all Compressed"
    tensors = (artifact.latents, artifact.starts, artifact.windows)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return "latents, starts and windows must be tensors"
    count, rows = sum(artifact.sizes), sum(_windows_of(memory, geometry) for memory in memories)
    if artifact.latents.dim() != 2 or len(artifact.latents) != count or artifact.latents.dtype not in DTYPES:
        return (
            f"its latents are {tuple(artifact.latents.shape)} of {artifact.latents.dtype}, its memories have "
            f"{count:,}"
        )
    if artifact.starts.shape != (count,) or artifact.starts.dtype != torch.int64:
        return f"its starts are {tuple(artifact.starts.shape)} of {artifact.starts.dtype}"
    if artifact.windows.shape != (rows, 32) or artifact.windows.dtype != torch.uint8:
        return f"its windows are {tuple(artifact.windows.shape)} of {artifact.windows.dtype}"
    for memory, starts in zip(memories, artifact.starts.split(artifact.sizes), strict=True):
        inside = (starts >= 0) & (starts < memory.characters)
        if not bool(inside.all()) or bool((starts[1:] < starts[:-1]).any()):
            return (
                f"the blocks of memory {memory.name[:60]!r} do not lie in its {memory.characters} characters"
            )
    if not bool(artifact.latents.isfinite().all()):
        return "its latents are not finite"
    return None


def _wrong(memory: Compressed) -> str | None:
    for field in fields(Compressed):
        value = getattr(memory, field.name)
        counts = field.name in ("characters", "tokens", "latents", "ratio")
        if counts and not (_whole(value) and value > 0):
            return f"a memory's {field.name} is {str(value)[:40]!r}"
        if not counts and not _text(value) and not (field.name == "licence" and value is None):
            return f"a memory's {field.name} is not Unicode text of up to {_MOST_NAME:,} characters"
    if not _hex(memory.sha256):
        return f"the sha256 of memory {memory.name[:60]!r} is no digest"
    if memory.latents != -(-memory.tokens // memory.ratio):
        return (
            f"memory {memory.name[:60]!r} has {memory.latents} latents for {memory.tokens} tokens at ratio "
            f"{memory.ratio}"
        )
    return None


def _windows_of(memory: Compressed, geometry: dict[str, Any]) -> int:
    return -(-memory.tokens // geometry["window"])


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_NAME and not _SURROGATE.search(value)


def _hex(value: Any) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None
