"""What a build will do: the recipe, the files that its sources read, the folders it works in."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lclm.data.shards import MANIFEST
from lclm.settings import load_settings, to_plain

from .settings import PipelineSettings, SourceSettings
from .sources import Inputs, find_inputs

BUILD = "build.json"
PIPELINE_VERSION = 1
"""Raised when the same recipe and inputs give other shards than before."""


@dataclass
class Plan:
    """A build: `out` is what it makes, `work` a folder beside it, named by `hash`, that exists while it
    runs."""

    settings: PipelineSettings
    inputs: dict[str, Inputs]
    evaluations: dict[str, Inputs]
    out: Path
    hash: str

    @property
    def work(self) -> Path:
        return self.out.with_name(f".{self.out.name}.building-{self.hash[:12]}")

    @property
    def staging(self) -> Path:
        """Where the result grows, to be renamed to `out`."""
        return self.work / "out"

    def folder(self, name: str) -> str:
        """A folder of the work in progress."""
        return str(self.work / name)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the manifest says about how the data set was made."""
        packages = {name: version(name) for name in ("datatrove", "webdataset", "tokenizers")}
        return {
            "hash": self.hash,
            "version": PIPELINE_VERSION,
            "packages": packages | {"python": platform.python_version()},
            "recipe": what_matters(self.settings),
            "inputs": {name: {"files": len(i.files), "stamp": i.stamp} for name, i in self.inputs.items()},
        }


def make_plan(recipe: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a pipeline recipe and find its inputs.

    :raises ValueError: a mistake in the recipe, or a source that is not there.
    """
    settings = load_settings(PipelineSettings, recipe, overrides)
    if "://" in settings.out:
        raise ValueError(
            f"out is {settings.out}: build on a local or shared file system, then copy it there; data "
            "sets are read over any fsspec URL"
        )
    inputs = {name: find_inputs(name, source) for name, source in settings.sources.items()}
    sets = settings.decontamination.evaluations if settings.decontamination else {}
    evaluations = {name: find_inputs(f"decontamination.evaluations.{name}", s) for name, s in sets.items()}
    stamps = {name: [i.files, i.stamp] for name, i in (inputs | evaluations).items()}
    content = json.dumps([PIPELINE_VERSION, what_matters(settings), stamps], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Plan(settings, inputs, evaluations, Path(settings.out).absolute(), digest)


def what_matters(settings: PipelineSettings) -> dict[str, Any]:
    """The settings that decide the result: not where it goes, nor how many workers make it."""
    plain = to_plain(settings)
    del plain["out"]
    plain["executor"] = {"tasks": plain["executor"]["tasks"]}
    return plain


def state_of(plan: Plan) -> str:
    """`missing`, `current`, `other` (made by another recipe or from other inputs) or `damaged`."""
    if not plan.out.exists():
        return "missing"
    try:
        found = json.loads((plan.out / BUILD).read_text())["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
    if found != plan.hash:
        return "other"
    return "current" if _complete(plan.out) else "damaged"


def _complete(folder: Path) -> bool:
    """Whether every file that a manifest names has its size."""
    try:
        manifests = json.loads((folder / BUILD).read_text())["data_sets"]
        for place in manifests:
            shards = json.loads((folder / place / MANIFEST).read_text())["shards"]
            for shard in shards:
                if (folder / place / shard["file"]).stat().st_size != shard["bytes"]:
                    return False
                if not (folder / place / shard["index"]).exists():
                    return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def sources_of(plan: Plan) -> list[dict[str, Any]]:
    """What the manifest says about the sources."""

    def describe(name: str, source: SourceSettings) -> dict[str, Any]:
        said = {"licence": source.licence or "not stated", "note": source.note}
        if source.kind == "stdlib":
            release = f"Library files of Python {platform.python_version()}"
            note = source.note or f"{release}, https://docs.python.org/3/license.html"
            said = {"licence": source.licence or "PSF-2.0", "note": note}
        return {"name": name, "kind": source.kind, "path": source.path} | said

    return [describe(name, source) for name, source in sorted(plan.settings.sources.items())]
