"""The last stages of a build: tasks' shards become data sets with manifests, and the result takes its
place."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from lclm.data.shards import MANIFEST, DataSet, Kind, Shard, write_manifest

from .plan import BUILD, Plan, sources_of
from .tokenizers import make_tokenizer


class Assemble(PipelineStep):
    """Numbers the tasks' shards through, writes each data set's manifest, and makes the tokenizer.

    Can be run again after it was interrupted. `labels` says, for each stage, what each of its steps is
    called in the manifest's `dropped`.
    """

    name = "🧾 Manifests"
    type = "💽 - WRITER"

    def __init__(self, plan: Plan, labels: dict[str, list[str]]) -> None:
        super().__init__()
        self.plan, self.labels = plan, labels

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        plan = self.plan
        dropped = dropped_of(plan, self.labels)
        parts = self._parts()
        if not parts:
            counts = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "the sources are empty"
            raise ValueError(f"the build of {plan.settings.name} has no documents left ({counts})")
        for product, shards in sorted(parts.items()):
            kind, _, split = product.partition("/")
            write_manifest(
                str(plan.staging / product),
                name=plan.settings.name,
                kind=cast(Kind, kind),
                split=split,
                shards=[self._rename(plan.staging / product, n, shard) for n, shard in enumerate(shards)],
                sources=sources_of(plan),
                pipeline=plan.provenance,
                dropped=dropped,
            )
        if plan.settings.tokenizer is not None:
            self._tokenizer()
        for file in plan.staging.rglob("*.tmp"):
            file.unlink()
        return iter(())

    def _parts(self) -> dict[str, list[Shard]]:
        parts: dict[str, list[Shard]] = defaultdict(list)
        for rank in range(self.plan.settings.executor.tasks):
            report = json.loads((Path(self.plan.folder("reports")) / f"{rank:05d}.json").read_text())
            for product, shards in report.items():
                parts[product] += [Shard(**shard) for shard in shards]
        return dict(parts)

    def _rename(self, folder: Path, number: int, shard: Shard) -> Shard:
        named = replace(shard, file=f"shard-{number:05d}.tar", index=f"shard-{number:05d}.npy")
        for old, new in ((shard.index, named.index), (shard.file, named.file)):
            if (folder / old).exists():
                (folder / old).rename(folder / new)
        return named

    def _tokenizer(self) -> None:
        settings, place = self.plan.settings.tokenizer, self.plan.staging / "documents" / "train"
        assert settings is not None
        if settings.trained and not (place / MANIFEST).exists():
            raise ValueError(
                "there are no training documents for the tokenizer to learn from: lower split.heldout"
            )
        texts = (sample.text or "" for sample in DataSet.open(str(place))) if settings.trained else ()
        make_tokenizer(settings, texts, self.plan.staging / "tokenizer")


class Publish(PipelineStep):
    """Adds token counts to the manifests, then renames the result into its place; the one before is
    removed."""

    name = "🚚 Into place"
    type = "💽 - WRITER"

    def __init__(self, plan: Plan, tokenizer: str | None) -> None:
        super().__init__()
        self.plan, self.tokenizer = plan, tokenizer

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        staging, out = self.plan.staging, self.plan.out
        if staging.exists():
            places = sorted(path.parent for path in staging.glob(f"*/*/{MANIFEST}"))
            self._count(places)
            made = {"schema": 1, "hash": self.plan.hash, "name": self.plan.settings.name}
            made["data_sets"] = [str(place.relative_to(staging)) for place in places]
            (staging / BUILD).write_text(json.dumps(made, indent=1) + "\n")
            put_in_place(staging, out)
        return iter(())

    def _count(self, places: list[Path]) -> None:
        if self.tokenizer is None:
            return
        counts = Counter[str]()
        for file in Path(self.plan.folder("counts")).glob("*.json"):
            counts.update(json.loads(file.read_text()))
        for place in places:
            manifest = json.loads((place / MANIFEST).read_text())
            manifest["tokens"] = {self.tokenizer: counts[f"{place.parent.name}/{place.name}"]}
            shards = [Shard(**shard) for shard in manifest.pop("shards")]
            known = ("schema", "fingerprint", "samples", "bytes", "text_bytes")
            rest = {key: value for key, value in manifest.items() if key not in known}
            write_manifest(str(place), shards=shards, **rest)


def put_in_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; what was there is moved aside first and then removed."""
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def dropped_of(plan: Plan, labels: dict[str, list[str]]) -> dict[str, int]:
    """How many documents (and, of a source, files) were left out, by reason, from the statistics of all
    tasks."""
    dropped = Counter[str]()
    for name, inputs in plan.inputs.items():
        dropped.update({f"{name}: {reason}": n for reason, n in inputs.dropped.items()})
    for stage, steps in labels.items():
        for file in sorted(Path(plan.folder(f"logs/{stage}/stats")).glob("*.json")):
            statistics = json.loads(file.read_text())[-len(steps) :]
            for label, step in zip(steps, statistics, strict=True):
                dropped.update(_dropped_by(label, step["stats"]))
    return dict(sorted(dropped.items()))


def _dropped_by(label: str, stats: dict[str, Any]) -> Counter[str]:
    totals = {key: value["total"] if isinstance(value, dict) else value for key, value in stats.items()}
    reasons = {
        key.removeprefix("dropped_"): int(n) for key, n in totals.items() if key.startswith("dropped_")
    }
    counts = Counter({f"{label}: {reason}" if label else reason: n for reason, n in reasons.items()})
    unexplained = int(totals.get("dropped", 0)) - sum(reasons.values())
    if unexplained > 0:
        counts[label] += unexplained
    return counts
