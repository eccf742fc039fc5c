from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lclm.recipe import Recipe, load_recipe, shipped
from lclm.settings import shipped_recipes

NAMES = [str(path.relative_to(shipped_recipes())) for path in shipped()]
STAGES = ["adapter", "encoder", "joint", "sft"]
GOOD = """
name: good
model: {decoder: {config: {model_type: qwen3}}, encoder: {config: {model_type: qwen3}}, ratio: 4, window: 64}
data:
  sources: {docs: {path: here}}
  tasks: {plain: {task: plain, source: docs}, read: {task: interleave, source: docs}}
  mixture: {read: 1.0}
stages:
  order: [two, one]
  one: {learn: {adapter: {lr: 1.0}}, steps: 3}
  two: {learn: {encoder: {lr: 1.0}}, tokens: 1.0e+6}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(shipped_recipes() / name)
    assert recipe.stages and recipe.data.mixture


def test_the_recipes_of_the_design_are_there() -> None:
    expected = {"tiny.yaml", "smollm2.yaml", "finetune.yaml", "search/base.yaml"}
    assert expected | {f"0.6b-4b/{name}.yaml" for name in ("base", "4x", "8x", "16x")} <= set(NAMES)


def test_recipes_do_not_share_a_run_folder() -> None:
    folders = [load_recipe(shipped_recipes() / name).run_dir for name in NAMES]
    assert len(set(folders)) == len(folders)


def test_search_recipes_are_small_diffs_on_one_base() -> None:
    for file in (shipped_recipes() / "search").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        if file.name != "base.yaml":
            assert content["extends"] == "base.yaml"
            assert len(file.read_text().splitlines()) <= 15


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(shipped_recipes() / "tiny.yaml", ["stages.scratch.steps=7", "engine.zero=1"])
    recipe.save(tmp_path / "run" / "recipe.yaml")
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    assert yaml.safe_load(recipe.to_yaml())["stages"]["order"] == list(recipe.stages)


def test_stages_come_in_order_and_those_left_out_are_gone(tmp_path: Path) -> None:
    assert list(load_recipe(write(tmp_path, GOOD)).stages) == ["two", "one"]
    assert list(load_recipe(write(tmp_path, GOOD), ["stages.order=[one]"]).stages) == ["one"]


def test_a_recipe_may_patch_a_stage_of_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nname: child\nstages: {one: {learn: {adapter: {lr: 0.5}}}}")
    recipe = load_recipe(child)
    assert recipe.name == "child" and recipe.run_dir == "runs/child"
    assert recipe.stages["one"].learn["adapter"].lr == 0.5 and recipe.stages["one"].steps == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.order=[one,tow]", "unknown stage 'tow'; did you mean 'two'"),
        ("stages.one.learn.adaptor={}", "unknown component 'adaptor'; did you mean 'adapter'"),
        ("stages.one.learn={adapter: null}", "stages.one.learn: nothing learns"),
        ("stages.one.tokens=5", "stages.one: give exactly one of steps and tokens"),
        ("stages.one.steps=0", "stages.one: steps and tokens must be above 0"),
        ("stages.one.mixture={raed: 1}", "stages.one.mixture.*raed"),
        ("stages.one.pack={positions: 0}", "stages.one.pack.positions"),
        ("data.lanes=7", "data.lanes"),
        ("data.tasks.plain.source=dosc", "data.tasks.plain.source"),
        ("data.tasks.plain.ratios=[4]", "data.tasks.plain.ratios has no effect"),
        (
            "data.tasks.read.ratios=[8]",
            r"data.tasks.read.ratios: \[8\] are not among the model's ratios \[4\]",
        ),
        ("model.ratio=5", "model.window: 64 is not a multiple of ratio 5; take 60"),
        ("model.ratio=128", "ratio 128 is not between 2 and 64"),
        ("model.ratios=[4,8]", "several ratios need pooling mean"),
        ("model.ratios=[8]", "default ratio 4 is not among"),
        ("model.decoder.config=null", "model.decoder: give a path"),
        ("schema=2", "schema: is 2"),
        ("engine.zero=4", "zero"),
        ("order=[one]", "did you mean 'stages.order'"),
    ],
)
def test_what_must_hold_between_parts(tmp_path: Path, override: str, message: str) -> None:
    overrides = [override, "model.pooling=concat"] if override == "model.ratios=[4,8]" else [override]
    overrides += ["data.micro_batch=2"] if override == "data.lanes=7" else []
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, GOOD), overrides)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)recipe.yaml.*ratio 128.*stages.one: give exactly one"):
        load_recipe(write(tmp_path, GOOD), ["model.ratio=128", "stages.one.tokens=5"])


def test_a_recipe_without_stages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stages: there is none"):
        load_recipe(write(tmp_path, GOOD.split("stages:")[0]))


@pytest.mark.parametrize("name", ["base", "4x", "8x", "16x"])
def test_the_released_settings(name: str) -> None:
    recipe = load_recipe(shipped_recipes() / "0.6b-4b" / f"{name}.yaml")
    stages = recipe.stages
    assert list(stages) == STAGES
    assert recipe.model.ratio == int(name.removesuffix("x") if name != "base" else 16)
    assert recipe.model.window == 1024 and recipe.model.pooling == "mean"
    assert recipe.data.pack.positions == 16384
    assert [set(stage.learn) for stage in stages.values()] == [
        {"adapter", "brackets"},
        {"adapter", "brackets", "encoder"},
        {"adapter", "brackets", "encoder", "decoder"},
        {"adapter", "brackets", "encoder", "decoder"},
    ]
    assert [stage.learn["adapter"].lr for stage in stages.values()] == [1e-3, 6e-5, 6e-5, 3e-5]
    assert [stage.schedule.warmup_steps for stage in stages.values()] == [250, 500, 1000, 500]
    assert stages["joint"].learn["decoder"].lr == 1e-5 and stages["sft"].learn["decoder"].lr == 3e-5
    for stage in stages.values():
        assert stage.clip == 1.0 and stage.schedule.kind == "cosine" and stage.schedule.min_lr == 1e-6
        for component, settings in stage.learn.items():
            assert settings.betas == [0.9, 0.95]
            assert settings.weight_decay == (0.01 if component in ("adapter", "encoder") else 0.0)


QWEN3 = {
    # encoder, adapter (RMSNorm, 1024 -> 2560 -> 2560 with biases), decoder, brackets
    "0.6b-4b/4x.yaml": (595_776_512, 9_181_184, 4_022_468_096, 5_120),
    "0.6b-4b/8x.yaml": (595_776_512, 9_181_184, 4_022_468_096, 5_120),
    "0.6b-4b/16x.yaml": (595_776_512, 9_181_184, 4_022_468_096, 5_120),
    "search/encoder-half.yaml": (375_543_296, 9_181_184, 4_022_468_096, 5_120),
    "search/decoder-0.6b.yaml": (595_776_512, 2_100_224, 596_049_920, 2_048),
}


@pytest.mark.parametrize("name", QWEN3)
def test_true_sizes_on_meta_tensors(name: str) -> None:
    from lclm.model.build import build_model, components

    model = build_model(load_recipe(shipped_recipes() / name).model, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = {part: sum(p.numel() for _, p in found) for part, found in components(model).items()}
    assert counts == dict(zip(("encoder", "adapter", "decoder", "brackets"), QWEN3[name], strict=True))
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_defaults_are_a_valid_schema() -> None:
    assert Recipe(name="x").to_dict()["stages"] == {"order": []}
