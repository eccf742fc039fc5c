"""Stages end to end in this process: freezing, LoRA, every ZeRO stage and precision, resuming, full disks."""

from __future__ import annotations

import resource
import signal

import pytest
import torch

from lclm.checkpoint import RunFolder
from lclm.recipe import load_recipe
from lclm.train.trainer import train
from tests.end_to_end import small_run as small

QUIET = {"validate_batches": 0, "save_every_steps": None, "log_every": 1}


def recipe_of(folder, content, *overrides):
    content["train"] |= QUIET
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return load_recipe(small.write(folder, content), list(overrides))


def start_weights(recipe):
    from lclm.model.build import build_model

    model = build_model(recipe.model, seed=recipe.seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def part_of(name):
    return "encoder" if name.startswith("block_position") else name.split(".")[0]


def changed(before, after):
    return {part_of(name) for name in after if not torch.equal(before[name], after[name])}


QUICK = [(0, "fp32"), (1, "bf16"), (3, "fp32")]
EVERY = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(
    ("zero", "precision"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in EVERY],
)
def test_only_what_learns_changes(data, tmp_path, zero, precision):
    stages = {
        "adapter": small.stage(2, learn=("adapter", "brackets")),
        "encoder": small.stage(2, learn=("encoder",)),
    }
    recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / "run", **stages))
    recipe.engine.zero, recipe.engine.precision = zero, precision
    before = start_weights(recipe)
    folder = RunFolder(train(recipe))
    first = small.weights(folder.stage(0, "adapter").export)
    second = small.weights(folder.stage(1, "encoder").export)
    assert all(value.dtype == torch.float32 for value in first.values())
    assert changed(before, first) == {"adapter", "brackets"}
    assert changed(first, second) == {"encoder"}


def test_zero_stages_agree(data, tmp_path):
    found = []
    for zero in range(4):
        recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / f"zero{zero}", only=small.stage(4)))
        recipe.engine.zero = zero
        checkpointing = recipe.engine.activation_checkpointing
        checkpointing.encoder = checkpointing.decoder = zero % 2 == 1
        found.append(small.losses(train(recipe)))
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-5)


def test_lora_is_merged_into_the_export(data, tmp_path):
    stages = {"tuned": small.stage(3, learn=("encoder", "decoder"))}
    stages["tuned"]["learn"]["decoder"]["lora"] = {"rank": 4, "targets": ["q_proj", "down_proj"]}
    stages["tuned"]["learn"]["encoder"]["lora"] = {"rank": 2, "targets": ["v_proj"], "dropout": 0.1}
    recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / "run", **stages))
    before = start_weights(recipe)
    after = small.weights(RunFolder(train(recipe)).export)
    names = {name for name in after if not torch.equal(before[name], after[name])}
    assert names
    assert {name.split(".")[-2] for name in names} == {"q_proj", "down_proj", "v_proj"}
    assert all(("encoder" in name) == ("v_proj" in name) for name in names)


@pytest.mark.parametrize(
    "zero", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_resuming_in_bf16_with_frozen_weights(data, tmp_path, zero):
    """Stopped between two steps and gone on with, at the same world size: the same weights."""
    exports = []
    for name, stops in (("whole", []), ("parts", [3])):
        content = small.recipe(data, tmp_path / name, only=small.stage(6, learn=("encoder", "adapter")))
        recipe = recipe_of(tmp_path, content)
        recipe.engine.zero, recipe.engine.precision = zero, "bf16"
        recipe.train.save_every_steps = 3
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                interrupted(recipe, stop)
        exports.append(small.weights(RunFolder(train(recipe)).export))
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])


def interrupted(recipe, step):
    """Train until the checkpoint after `step` is written."""
    import lclm.train.watch as watch

    class Stopping(watch.Watcher):
        def saved(self):
            raise KeyboardInterrupt

    import lclm.train.trainer as trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Watcher", Stopping)
        train(recipe)


def test_a_full_disk_leaves_no_half_checkpoint(data, tmp_path):
    recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / "run", only=small.stage(4)))
    recipe.train.save_every_steps, recipe.train.max_failed_saves = 2, 1
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"could not write .*step-00000002.*MiB are free"):
            train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    stage = RunFolder(tmp_path / "run").stage(0, "only")
    assert list(stage.checkpoints.iterdir()) == []
    train(recipe)


def test_a_damaged_checkpoint_is_passed_by(data, tmp_path, capsys):
    recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / "run", only=small.stage(6)))
    recipe.train.save, recipe.train.save_every_steps = "sync", 2
    with pytest.raises(KeyboardInterrupt):
        interrupted(recipe, 2)
    stage = RunFolder(tmp_path / "run").stage(0, "only")
    half = stage.checkpoints / "step-00000004.tmp"
    half.mkdir()
    (half / "state.json").write_text("{}")
    (stage.checkpoint(2) / "state.json").write_text("{}")
    train(recipe)
    assert "step-00000002 is damaged" in capsys.readouterr().out
    assert len(small.losses(tmp_path / "run")) == 6


def test_budgets_are_fitted_to_a_time_once(data, tmp_path):
    content = small.recipe(data, tmp_path / "run", only=small.stage(100_000, learn=("encoder",)))
    recipe = recipe_of(tmp_path, content, "train.fit_minutes=0.02", "train.fit_steps=2")
    train(recipe)
    folder = RunFolder(tmp_path / "run")
    steps = load_recipe(folder.recipe).stages["only"].steps
    assert 2 <= steps < 100_000
    assert len(small.losses(folder.path)) == steps
    train(recipe)


def test_a_budget_in_tokens(data, tmp_path):
    stage = small.stage(learn=("adapter",)) | {"steps": None, "tokens": 5000}
    recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / "run", only=stage))
    lines = small.lines(train(recipe))
    assert lines[-1]["source_tokens"] >= 5000 > lines[-2]["source_tokens"]


def test_a_single_epoch_ends_the_stage(data, tmp_path, capsys):
    stage = small.stage(10_000, learn=("adapter",))
    recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / "run", only=stage), "data.epochs=1")
    lines = small.lines(train(recipe))
    assert "epochs are used up" in capsys.readouterr().out
    assert 5 < len(lines) < 200


def test_probes_and_samples_with_sharded_weights(data, tmp_path):
    content = small.recipe(data, tmp_path / "run", only=small.stage(2))
    content["engine"]["zero"] = 3
    run = train(load_recipe(small.write(tmp_path, content)))
    (line,) = small.lines(run, "probe")
    assert line["probes"]["reconstruction"]
    assert "written" in (run / "samples.md").read_text()


def test_non_finite_losses_stop_the_run_with_the_samples_keys(data, tmp_path):
    recipe = recipe_of(tmp_path, small.recipe(data, tmp_path / "run", only=small.stage(9)))
    recipe.train.max_skips_in_a_row = 3
    recipe.stages["only"].learn["decoder"].lr = 1e30
    recipe.stages["only"].clip = 0.0
    with pytest.raises(ValueError, match=r"3 steps in a row .*train-(documents|conversations)-"):
        train(recipe)
    skips = [line for line in small.lines(tmp_path / "run", "event") if line["event"] == "skip"]
    assert len(skips) >= 2
