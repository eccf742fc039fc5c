"""A build as stages, each a datatrove pipeline over a fixed number of tasks, on local processes, SLURM or
Ray."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig

from lclm.settings import unknown_name

from .assemble import Assemble, Publish
from .plan import Plan
from .settings import DecontaminationSettings, DedupSettings, ExecutorSettings, SourceSettings
from .sources import Inputs, make_reader
from .steps import CountTokens, NgramIndex, PlainWords, Presence, ReadBack, WriteShards, make_filter, split_of

Labelled = list[tuple[str, PipelineStep]]
"""Steps, each with what the manifest calls its drops ("" where the step names them itself)."""

HASHES = HashConfig(hash_fc="sha1")
"""datatrove's default, xxhash, fails with xxhash 4."""

EXECUTORS: dict[str, type[PipelineExecutor]] = {
    "local": LocalPipelineExecutor,
    "slurm": SlurmPipelineExecutor,
    "ray": RayPipelineExecutor,
}


@dataclass
class Stage:
    """Steps that run over `tasks` parts of the data, once the stage before is complete."""

    name: str
    steps: Labelled
    tasks: int


def make_stages(plan: Plan) -> list[Stage]:
    """All stages of a build, in order."""
    settings = plan.settings
    tasks = settings.executor.tasks
    read = _readers(plan.folder("inputs"), settings.sources, plan.inputs)
    read += [(f"filters.{name}", make_filter(name, f)) for name, f in settings.filters.items()]
    write: Labelled = []
    stages: list[Stage] = []
    if settings.decontamination is not None:
        index, check = _decontamination(plan, settings.decontamination)
        stages.append(index)
        write += check
    write.append(("", WriteShards(str(plan.staging), plan.folder("reports"), settings)))
    if settings.dedup is None:
        stages.append(Stage("write", read + write, tasks))
    else:
        found, keep = _dedup(plan, settings.dedup, read)
        stages += [*found, Stage("write", [("", ReadBack(plan.folder("documents"))), *keep, *write], tasks)]
    labels = {
        stage.name: [label for label, _ in stage.steps] for stage in stages if stage.name != "evaluations"
    }
    stages.append(Stage("assemble", [("", Assemble(plan, labels))], 1))
    tokenizer = str(plan.staging / "tokenizer") if settings.tokenizer else settings.count_tokens_with
    if tokenizer is not None:
        count = CountTokens(str(plan.staging), plan.folder("counts"), tokenizer)
        stages.append(Stage("count", [("", count)], tasks))
    name = f"tokenizer ({settings.tokenizer.kind})" if settings.tokenizer else settings.count_tokens_with
    stages.append(Stage("publish", [("", Publish(plan, name))], 1))
    return stages


def training_texts(plan: Plan, lists: str) -> Iterator[str]:
    """The filtered training documents of all sources, read in this process; `lists` is an empty folder."""
    steps = _readers(lists, plan.settings.sources, plan.inputs)
    steps += [(name, make_filter(name, f)) for name, f in plan.settings.filters.items()]
    documents: Any = None
    for _, step in steps:
        documents = step(documents, 0, 1)
    for document in documents:
        if split_of(document, plan.settings) == "train":
            yield document.text


def _readers(lists: str, sources: dict[str, SourceSettings], inputs: dict[str, Inputs]) -> Labelled:
    """A reader for every source, one after another; what files it reads is written to the folder `lists`."""
    folder = Path(lists)
    folder.mkdir(parents=True, exist_ok=True)
    readers: Labelled = []
    for name, source in sources.items():
        file = folder / f"{inputs[name].name}.txt"
        file.write_text("".join(f"{path}\n" for path in inputs[name].files), encoding="utf-8")
        readers.append(("", make_reader(name, source, inputs[name], str(file))))
    return readers


def _decontamination(plan: Plan, settings: DecontaminationSettings) -> tuple[Stage, Labelled]:
    config = NGramsDecontConfig(n_grams=settings.ngrams, hash_config=HASHES)
    folder = plan.folder("evaluations")
    steps = _readers(plan.folder("inputs"), settings.evaluations, plan.evaluations)
    steps.append(("", NgramIndex(folder, config)))
    check = NGramsDecontFilter(folder, config=config, language=PlainWords())
    return Stage("evaluations", steps, 1), [("decontamination", check)]


def text_of(document: Document) -> str:
    """What exact deduplication compares."""
    return document.text


def _dedup(plan: Plan, settings: DedupSettings, read: Labelled) -> tuple[list[Stage], Labelled]:
    """The stages that find duplicates, and the filter that leaves one of each kind."""
    tasks = plan.settings.executor.tasks
    signatures, pairs, remove = (plan.folder(f"dedup/{name}") for name in ("signatures", "pairs", "remove"))
    kept: Labelled = [("", JsonlWriter(plan.folder("documents"), compression=None))]
    if settings.kind == "exact":
        exact = ExactDedupConfig(content_getter=text_of, hash_config=HASHES)
        found = [
            Stage("read", [*read, *kept, ("", ExactDedupSignature(signatures, exact))], tasks),
            Stage("duplicates", [("", ExactFindDedups(signatures, remove, exact))], 1),
        ]
        Path(remove).mkdir(parents=True, exist_ok=True)
        return found, [("exact duplicates", ExactDedupFilter(remove, exact))]
    config = MinhashConfig(
        n_grams=settings.ngrams,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        hash_config=HASHES,
    )
    signature = MinhashDedupSignature(signatures, config=config, language=PlainWords())
    found = [
        Stage("read", [*read, *kept, ("", signature)], tasks),
        Stage("buckets", [("", MinhashDedupBuckets(signatures, pairs, config=config))], settings.buckets),
        Stage("duplicates", [("", MinhashDedupCluster(pairs, remove, config=config))], 1),
    ]
    return found, [("near duplicates (minhash)", MinhashDedupFilter(remove))]


def make_executor(
    stage: Stage, settings: ExecutorSettings, logs: str, depends: PipelineExecutor | None = None
) -> Any:
    """datatrove's executor for one stage. Its completion marks lie in `logs`, which no other build shares.

    :raises ValueError: an option that the executor does not take, or lacks.
    """
    found = EXECUTORS[settings.kind]
    accepted = [name for name in inspect.signature(found.__init__).parameters if name != "self"]
    own = ("pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed")
    options = dict(settings.options)
    for option in options:
        if option not in accepted or option in own:
            known = [name for name in accepted if name not in own]
            raise ValueError(f"executor.options ({settings.kind}): {unknown_name('option', option, known)}")
    steps = [step for _, step in stage.steps]
    if settings.kind == "local":
        steps.insert(0, Presence(f"{logs}/presence"))
    if settings.kind == "slurm":
        options.setdefault("job_name", f"lclm-data-{stage.name}")
    try:
        return found(
            pipeline=steps,
            tasks=stage.tasks,
            workers=min(settings.workers, stage.tasks),
            logging_dir=f"{logs}/{stage.name}",
            depends=depends,
            **options,
        )
    except TypeError as error:
        raise ValueError(f"executor.options ({settings.kind}): {error}; set them in the recipe") from error


def completed(logs: str, stage: Stage) -> int:
    """How many tasks of a stage are done."""
    return len(list(Path(logs, stage.name, "completions").glob("*")))
