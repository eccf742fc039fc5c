"""The layout of a run folder and of its checkpoints; writing each whole or not at all; verification.

RUN/
  recipe.yaml          the resolved recipe, budgets fitted      requested.yaml   the same before fitting
  provenance.json      commit, diff, versions, launcher         metrics.jsonl, tensorboard/, samples.md
  stages/01-NAME/      checkpoints/step-00000123/ (engine/, state.json, checksums.json), export/, done.json
  export/              the trained model and processor

A folder is written under a temporary name, synced to the disk and renamed when its last file is there:
whatever has its final name was whole, and still is after a loss of power. `checksums.json` lists the other
files of a checkpoint with size and SHA-256; `done.json` does so for the export. A checkpoint that was damaged
later is set aside as `step-00000123.damaged` until the next one is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

SCHEMA = 1
CHECKSUMS = "checksums.json"
STATE = "state.json"
DAMAGED = ".damaged"
UNIVERSAL = ".universal"
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"),
    *(
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "DS_ACCELERATOR",
        "SLURM_JOB_ID",
        "SLURM_NNODES",
        "SLURM_NTASKS",
    ),
    *("HF_HUB_OFFLINE", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM"),
)
"""Environment variables that provenance records; no other is, so that no secret is."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe that restarts read."""
        return self.path / "recipe.yaml"

    @property
    def requested(self) -> Path:
        """The resolved recipe as it was asked for, before budgets were fitted to a time."""
        return self.path / "requested.yaml"

    @property
    def provenance(self) -> Path:
        """Where the run came from."""
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line; see lclm.train.metrics."""
        return self.path / "metrics.jsonl"

    @property
    def faults(self) -> Path:
        """Stacks of processes that did not go on."""
        return self.path / "faults"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's folder."""
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        """Texts that the model wrote during training."""
        return self.path / "samples.md"

    @property
    def export(self) -> Path:
        """The trained model and processor."""
        return self.path / "export"

    def stage(self, index: int, name: str) -> StageFolder:
        """The folder of the `index`-th stage, counted from 0."""
        return StageFolder(self.path / "stages" / f"{index + 1:02d}-{name}")


@dataclass(frozen=True)
class StageFolder:
    """Paths of a stage."""

    path: Path

    @property
    def export(self) -> Path:
        """The model as the stage left it, in the master weights' precision."""
        return self.path / "export"

    @property
    def done(self) -> Path:
        """Written last: the state that the stage ended with."""
        return self.path / "done.json"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after the stage's `step` steps."""
        return self.checkpoints / f"step-{step:08d}"

    def candidates(self) -> list[Path]:
        """Checkpoints, newest first. What was left half-written has another name and is none."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(
            (p for p in self.checkpoints.iterdir() if re.fullmatch(r"step-\d{8}", p.name)), reverse=True
        )

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints, with their universal forms, and whatever was left
        half-written or set aside."""
        if self.checkpoints.is_dir():
            for path in self.checkpoints.iterdir():
                if is_temporary(path) or path.name.endswith(DAMAGED):
                    shutil.rmtree(path, ignore_errors=True)
        candidates = self.candidates()
        for path in candidates[keep:]:
            discard(path)
        kept = {universal_folder(path) for path in candidates[:keep]}
        if self.checkpoints.is_dir():
            for path in self.checkpoints.glob(f"*{UNIVERSAL}"):
                if path not in kept:
                    discard(path)


def temporary(final: Path) -> Path:
    """The name under which `final` is written before it is renamed."""
    return final.with_name(final.name + ".tmp")


def universal_folder(checkpoint: Path) -> Path:
    """Where a checkpoint's universal form is kept, for other numbers of processes; see lclm.train.elastic."""
    return checkpoint.with_name(checkpoint.name + UNIVERSAL)


def is_temporary(path: Path) -> bool:
    """Whether the name is one of `temporary`."""
    return path.name.endswith(".tmp")


def start_folder(final: Path) -> Path:
    """An empty folder to write into; what a killed attempt left there is removed."""
    beside = temporary(final)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def finish_folder(final: Path) -> None:
    """Give the written folder its final name, in place of an older one, when all of it is on the disk."""
    beside = temporary(final)
    for path in beside.rglob("*"):
        sync(path)
    sync(beside)
    discard(final)
    beside.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:  # some network file systems cannot sync folders
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(file)


def finish_checkpoint(final: Path, state: Any, sums: dict[str, dict[str, Any]]) -> None:
    """Add the state and the checksums, of the files in `sums` and its own, and rename into place."""
    beside = temporary(final)
    write_json(beside / STATE, state)
    files = sums | checksums(beside, [beside / STATE])
    write_json(beside / CHECKSUMS, {"schema": SCHEMA, "files": files})
    finish_folder(final)


def set_aside(path: Path) -> None:
    """Take its name from a damaged checkpoint, so that it neither counts nor hides good ones."""
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(aside)


def discard(path: Path) -> None:
    """Remove a folder; it loses its final name first, so that no half of it is ever taken for whole."""
    if path.exists():
        beside = temporary(path.with_name(path.name + ".old"))
        shutil.rmtree(beside, ignore_errors=True)
        path.rename(beside)
        shutil.rmtree(beside, ignore_errors=True)


def write_folder(final: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(folder)` fill a folder that then becomes `final`.

    Raises ValueError, with nothing left behind, when it cannot be written (a full disk).
    """
    try:
        write(start_folder(final))
        finish_folder(final)
    except OSError as error:
        shutil.rmtree(temporary(final), ignore_errors=True)
        raise cannot_write(final, str(error)) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by a temporary name and a rename. ValueError when it cannot be written."""
    beside = temporary(path)
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(value, indent=1), encoding="utf-8")
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise cannot_write(path, str(error)) from error


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError names it when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or its folder, and start again") from None


def cannot_write(path: Path, reason: str) -> ValueError:
    """The error of a write that failed, with the space left on the disk; `reason` may be its text."""
    if reason.startswith("could not write"):
        return ValueError(reason)
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    return ValueError(
        f"could not write {path}: {reason}. {free:,.0f} MiB are free there; nothing half-written was kept. "
        "See to it that the folder can be written, free some space or lower train.keep"
    )


def list_files(folder: Path) -> list[Path]:
    """All files below `folder` but its checksums, sorted."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{path in the folder: {"bytes", "sha256"}}."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, share: int = 0, of: int = 1) -> str | None:
    """What is wrong with a checkpoint compared with its checksums, None if nothing.

    `share` and `of` let several processes look at a part of the files each.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        if STATE not in expected:
            return f"{folder / CHECKSUMS} does not list {STATE}"
        return changed(folder, expected, share, of)
    except FileNotFoundError:
        return f"{folder / CHECKSUMS} is missing"
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{folder / CHECKSUMS} is damaged or cannot be read ({type(error).__name__}: {error})"


def changed(folder: Path, expected: dict[str, Any], share: int = 0, of: int = 1) -> str | None:
    """What is wrong with the first of the files `expected` (see `checksums`) that is damaged, or None."""
    for name in sorted(expected)[share::of]:
        path, size = folder / name, expected[name]["bytes"]
        try:
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes instead of {size:,}"
            if sha256(path) != expected[name]["sha256"]:
                return f"{path} is not the file that was written"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error})"
    return None


def weights_fingerprint(named: Iterable[tuple[str, Any]]) -> str:
    """Of named tensors, or of functions that read them: their names, dtypes, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, given in sorted(named, key=lambda item: item[0]):
        tensor = given if torch.is_tensor(given) else given()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def provenance(seed: int, fingerprints: dict[str, str]) -> dict[str, Any]:
    """Commit, uncommitted diff, versions, launcher variables, seed and data fingerprints of a run."""
    versions = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {
        "schema": SCHEMA,
        "commit": commit(),
        "diff": _git("diff", "HEAD"),
        "versions": dict(sorted(versions.items())),
        "launcher": {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ},
        "seed": seed,
        "data": fingerprints,
    }


def commit() -> str | None:
    """The commit that this code is of; None outside a checkout."""
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
