"""What a model card may say: facts of a checkpoint and of the run that made it, read from their files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lclm.checkpoint import RunFolder
from lclm.eval.record import RunRecord, StageRecord, read_run
from lclm.eval.verdict import Verdict, verdicts
from lclm.hub.remote import scrub

KEPT_ROWS = ("adapter", "marks.safetensors")
"""Rows that the brackets replace in the released layout: no parameters of the model."""
PACKAGES = ("lclm", "torch", "transformers", "deepspeed", "peft", "safetensors")
HUB_ID = re.compile(r"[\w][\w.-]{0,95}/[\w.-]{1,96}")


@dataclass
class Facts:
    """Of one checkpoint. What is not known is empty, and the card says so.

    folder: the checkpoint. config: its settings. parameters: by component. record: the run up to the end of
    `stage`. stages: those that this checkpoint went through, in order. tokens: source tokens each read.
    probed: the step of `results`, which are of exactly these weights, or None.
    """

    folder: Path
    config: Any
    parameters: dict[str, int]
    dtypes: list[str]
    stage: str | None = None
    record: RunRecord | None = None
    stages: list[StageRecord] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    step: int | None = None
    probed: int | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """native or released."""
        return "native" if (self.folder / "config.json").is_file() else "released"

    @property
    def recipe(self) -> dict[str, Any]:
        """The run's resolved recipe, without secrets and with local paths shortened; {} if there is none."""
        return _public(self.record.recipe) if self.record else {}

    @property
    def verdicts(self) -> list[Verdict]:
        """What was measured of these weights."""
        return [row for row in verdicts(self.results) if row.value is not None]

    @property
    def last_stage(self) -> bool:
        """Whether the recipe has no stage after this one."""
        order = (self.recipe.get("stages") or {}).get("order") or []
        return not order or self.stage is None or order[-1] == self.stage


def gather(folder: Path, run: Path | None = None, stage: str | None = None, *, local: bool = False) -> Facts:
    """Facts of the checkpoint in `folder`, which is `run`'s after `stage` if both are given.

    local: look at no data set that lies on another machine.

    Raises ValueError when `folder` is no checkpoint.
    """
    from lclm.model import LCLMForConditionalGeneration

    parameters, dtypes = count_parameters(folder)
    if not parameters:
        raise ValueError(f"{folder} is no checkpoint: it holds no .safetensors file")
    facts = Facts(folder, LCLMForConditionalGeneration.read_config(folder), parameters, dtypes, stage)
    if run is None:
        return facts
    paths = RunFolder(run)
    whole = read_run(run, local=local) if paths.metrics.is_file() else _without_metrics(paths)
    done = _stages_done(paths)
    facts.step = (done.get(stage or "") or {}).get("step")
    facts.record = _until(whole, facts.step)
    order = list(done)
    passed = order[: order.index(stage) + 1] if stage in order else order
    facts.stages = [one for one in facts.record.stages() if not passed or one.name in passed]
    facts.tokens = {
        name: int(done[name]["stage_tokens"]) for name in passed if done[name].get("stage_tokens") is not None
    }
    for step, result in facts.record.probes:
        if step == facts.step or (facts.step is None and stage is None):
            facts.probed, facts.results = step, result
    return facts


def count_parameters(folder: Path) -> tuple[dict[str, int], list[str]]:
    """({component: parameters}, dtypes) of the safetensors files below a checkpoint folder, from headers.

    Raises ValueError for a file that is damaged.
    """
    counts = dict.fromkeys(("encoder", "adapter", "decoder", "brackets"), 0)
    dtypes: set[str] = set()
    for path in sorted(folder.rglob("*.safetensors")):
        place = path.relative_to(folder).parts
        if place == KEPT_ROWS:
            continue
        for name, shape, dtype in _described(path):
            component = place[0] if len(place) > 1 else name.split(".")[0]
            component = "encoder" if component == "block_position" else component
            counts[component] = counts.get(component, 0) + math.prod(shape)
            dtypes.add(dtype)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return {n: count for n, count in counts.items() if count}, sorted(names.get(d, d) for d in dtypes)


def _described(path: Path) -> list[tuple[str, list[int], str]]:
    """(name, shape, dtype) of every tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [(name, part.get_shape(), part.get_dtype()) for name, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); export the checkpoint again") from None


def _without_metrics(run: RunFolder) -> RunRecord:
    """A run whose metrics are not here: its recipe alone."""
    import yaml

    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) if run.recipe.is_file() else {}
    return RunRecord(run.path, {}, recipe=recipe or {}, absent=["training metrics"])


def _stages_done(run: RunFolder) -> dict[str, dict[str, Any]]:
    """{stage: the state that it ended with} of a run's complete stages, in order."""
    found = {}
    for path in sorted(run.path.glob("stages/[0-9]*-*/done.json")):
        state = json.loads(path.read_text(encoding="utf-8")).get("state")
        found[path.parent.name.partition("-")[2]] = state if isinstance(state, dict) else {}
    return found


def _until(record: RunRecord, step: int | None) -> RunRecord:
    """The run as it was after `step`."""
    if step is None:
        return record
    lines = {
        kind: kept
        for kind, every in record.lines.items()
        if (kept := [line for line in every if line["step"] <= step])
    }
    return replace(record, lines=lines)


def _public(value: Any) -> Any:
    """Settings as they may be shown to anybody: no secrets in addresses, no places of somebody's machine."""
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = scrub(value)
    if text.startswith(("/", "~", "file://")):
        return "…/" + "/".join(Path(text).parts[-2:])
    return text


def base_models(facts: Facts) -> list[str]:
    """Hub ids that the recipe's weights come from: encoder first; [] where none is known."""
    model = (facts.record.recipe if facts.record else {}).get("model") or {}
    named = [
        model.get("init_from"),
        (model.get("encoder") or {}).get("path"),
        (model.get("decoder") or {}).get("path"),
    ]
    return list(dict.fromkeys(path for path in named if path and is_hub_id(path)))


def is_hub_id(path: str) -> bool:
    """Whether a path of a recipe names a repository of the Hub, and not a folder or package."""
    looks = HUB_ID.fullmatch(path) is not None and not path.startswith(("runs/", "data/"))
    return looks and not Path(path).exists()


def random_parts(facts: Facts) -> list[str]:
    """The parts of the model that began with random weights."""
    model = facts.recipe.get("model") or {}
    if not model or model.get("init_from"):
        return []
    return [part for part in ("encoder", "decoder") if not (model.get(part) or {}).get("path")]


def hub_datasets(facts: Facts) -> list[str]:
    """Hub ids of the data sets that the training data was built from, as its manifests name them."""
    sources = [
        source
        for manifest in (facts.record.datasets if facts.record else [])
        for source in manifest.get("sources") or []
        if isinstance(source, dict) and source.get("kind") == "huggingface"
    ]
    names = dict.fromkeys(str(source.get("path") or "") for source in sources)
    return [name for name in names if re.fullmatch(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", name)]


def unlicensed(facts: Facts) -> list[str]:
    """Names of training sources whose licence nobody noted."""
    found = []
    for manifest in facts.record.datasets if facts.record else []:
        sources = manifest.get("sources") or []
        if not sources:
            found.append(str(manifest.get("name", manifest["source"])))
        found += [
            str(source.get("name", "unnamed"))
            for source in sources
            if isinstance(source, dict) and source.get("licence") in (None, "", "not stated")
        ]
    return sorted(set(found))


def longest_memory(facts: Facts) -> int | None:
    """The longest memory, in tokens, that the recipe's tasks make of documents; None if it is not said."""
    tasks = (facts.recipe.get("data") or {}).get("tasks") or {}
    spans = [task.get("max_span") for task in tasks.values() if isinstance(task, dict)]
    return max((int(span) for span in spans if span), default=None)
