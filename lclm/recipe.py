"""The recipe: everything a run needs, composed of the settings that each part owns.

`lclm.settings` reads, extends and overrides the YAML; here is the whole of it, what must hold across parts,
and the resolved form that a run folder keeps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lclm.data.settings import DataSettings
from lclm.eval.probes import ProbeSettings
from lclm.model.settings import ModelSettings
from lclm.settings import load_settings, shipped_recipes, to_plain, to_yaml, unknown_name
from lclm.train.settings import COMPONENTS, EngineSettings, StageSettings, TrainSettings

SCHEMA = 1


@dataclass
class Recipe:
    """A run. `stages` holds the stages in the order in which they are trained."""

    schema: int = SCHEMA
    name: str = "???"
    seed: int = 0
    run_dir: str = "runs/${name}"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    order: list[str] | None = None
    stages: dict[str, StageSettings] = field(default_factory=dict)
    engine: EngineSettings = field(default_factory=EngineSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)

    def __post_init__(self) -> None:
        names = list(self.stages) if self.order is None else self.order
        for name in names:
            if name not in self.stages:
                raise ValueError(f"stages.order: {unknown_name('stage', name, self.stages)}")
        self.order = names
        self.stages = {name: self.stages[name] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, shaped as in YAML (`stages.order` beside the stages)."""
        plain = to_plain(self)
        order = plain.pop("order")
        plain["stages"] = {"order": order, **plain["stages"]}
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe: no `extends:`, every setting written out."""
        return to_yaml(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe under a temporary name and rename it: half of one is never seen."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + f".tmp{os.getpid()}")
        try:
            beside.write_text(self.to_yaml(), encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def stage_data(self, name: str) -> DataSettings:
        """The `data` section with the mixture and pack of a stage in their place."""
        stage = self.stages[name]
        return replace(
            self.data, mixture=stage.mixture or self.data.mixture, pack=stage.pack or self.data.pack
        )

    @staticmethod
    def read(path: str | Path) -> Recipe:
        """A recipe from a file that `save` wrote; not validated again."""
        return load_recipe(path, validate=False)

    def validate(self) -> None:
        """What must hold across parts. Raises one ValueError that lists everything that does not."""
        problems = [*_schema_problems(self), *_model_problems(self), *_data_problems(self)]
        for name in self.stages:
            problems += _stage_problems(self, name)
        if not self.stages:
            problems.append("stages: there is none; add one, for example stages.joint")
        if problems:
            raise ValueError(f"recipe {self.name!r}: " + "\n".join(problems))


def shipped() -> list[Path]:
    """Every recipe that comes with lclm (the pipelines of data sets, in `data/`, are not recipes)."""
    folder = shipped_recipes()
    return sorted(p for p in folder.rglob("*.yaml") if p.relative_to(folder).parts[0] != "data")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, validate: bool = True) -> Recipe:
    """Read a recipe (a file, or the name of a shipped one), apply `key=value` overrides, and validate it.

    Raises FileNotFoundError or ValueError, naming the file and the key.
    """
    recipe = load_settings(Recipe, path, overrides, prepare=_lift_order)
    if validate:
        try:
            recipe.validate()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return recipe


def _lift_order(content: dict[str, Any]) -> dict[str, Any]:
    """`stages.order` is a list among named stages: move it to where the dataclass has it."""
    if "order" in content:
        raise ValueError("unknown key 'order'; did you mean 'stages.order'?")
    stages = content.get("stages")
    if isinstance(stages, dict) and "order" in stages:
        stages = dict(stages)
        content = {**content, "order": stages.pop("order"), "stages": stages}
    return content


def _schema_problems(recipe: Recipe) -> list[str]:
    if recipe.schema != SCHEMA:
        return [
            f"schema: is {recipe.schema}, but this version of lclm reads {SCHEMA}; install a matching lclm"
        ]
    return []


def trained_ratios(recipe: Recipe) -> list[int]:
    """The ratios the model is trained for, [] when they come from `model.init_from`."""
    model = recipe.model
    return list(model.ratios or ([model.ratio] if model.ratio else []))


def _model_problems(recipe: Recipe) -> list[str]:
    model, problems = recipe.model, []
    ratios = trained_ratios(recipe)
    for ratio in ratios:
        if not 2 <= ratio <= 64:
            problems.append(f"model: ratio {ratio} is not between 2 and 64")
        elif model.window and model.window % ratio:
            problems.append(
                f"model.window: {model.window} is not a multiple of ratio {ratio}; "
                f"take {model.window // ratio * ratio or ratio}"
            )
    if len(ratios) > 1 and model.pooling in ("concat", "eos"):
        problems.append(f"model.ratios: several ratios need pooling mean, not {model.pooling}")
    if model.ratio and model.ratios and model.ratio not in model.ratios:
        problems.append(
            f"model.ratio: the default ratio {model.ratio} is not among model.ratios {model.ratios}"
        )
    if not model.init_from and not (model.decoder.path or model.decoder.config):
        problems.append("model.decoder: give a path, a config, or model.init_from")
    if not model.init_from and not (model.encoder.path or model.encoder.config):
        problems.append("model.encoder: give a path, a config, or model.init_from")
    return problems


def _data_problems(recipe: Recipe) -> list[str]:
    problems = _raised(recipe.data.validate)
    ratios = trained_ratios(recipe)
    for name, task in recipe.data.tasks.items():
        other = [ratio for ratio in task.ratios or [] if ratios and ratio not in ratios]
        if other:
            problems.append(f"data.tasks.{name}.ratios: {other} are not among the model's ratios {ratios}")
    return problems


def _stage_problems(recipe: Recipe, name: str) -> list[str]:
    stage, where = recipe.stages[name], f"stages.{name}"
    problems = [
        f"{where}.learn: {unknown_name('component', component, COMPONENTS)}"
        for component in stage.learn
        if component not in COMPONENTS
    ]
    if not stage.learn:
        problems.append(f"{where}.learn: nothing learns; name at least one of {', '.join(COMPONENTS)}")
    if (stage.steps is None) == (stage.tokens is None):
        problems.append(f"{where}: give exactly one of steps and tokens")
    if (stage.steps is not None and stage.steps < 1) or (stage.tokens is not None and stage.tokens <= 0):
        problems.append(f"{where}: steps and tokens must be above 0")
    if stage.mixture is not None:
        problems += _raised(recipe.data.validate_mixture, stage.mixture, f"{where}.mixture")
    if stage.pack is not None:
        problems += _raised(stage.pack.validate, f"{where}.pack")
    return problems


def _raised(check: Callable[..., None], *arguments: Any) -> list[str]:
    try:
        check(*arguments)
    except ValueError as error:
        return [str(error)]
    return []
