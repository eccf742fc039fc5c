"""Exports straight from training checkpoints: what training itself writes, whatever the processes were."""

from __future__ import annotations

import itertools
import json
import shutil
from unittest import mock

import pytest

from lclm.checkpoint import RunFolder, StageFolder, list_files, sha256
from lclm.cli import main
from lclm.hub.export import export_run
from lclm.model.build import build_model, build_processor
from lclm.model.settings import ModelSettings
from lclm.recipe import Recipe
from lclm.settings import build_settings
from lclm.train.weights import open_checkpoint
from tests.distributed import many
from tests.distributed.test_elastic import LORA, joint, launch, train_job
from tests.end_to_end import small_run as small
from tests.hub import peak

SIZES, ZEROS = (1, 2, 4), (1, 2, 3)
STAGES = {
    "joint": small.stage(4),
    "lora": {**small.stage(4), "learn": {"adapter": {"lr": 3e-3}, "decoder": LORA}},
    "encoder": small.stage(4, learn=("encoder", "adapter")),
}


def files(folder):
    return {str(path.relative_to(folder)): sha256(path) for path in list_files(folder)}


def weight_files(folder):
    found = {name: digest for name, digest in files(folder).items() if name.endswith(".safetensors")}
    assert found
    return found


def quick(content, **engine):
    """Without what takes time beside the steps."""
    content["engine"] |= engine
    content["train"] |= {"save_every_steps": 2, "validate_batches": 0, "keep": 9}
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return content


def exported(run, output, **which):
    """An export of a training checkpoint, through the library; what was said."""
    said = []
    stored = open_checkpoint(Recipe.read(RunFolder(run).recipe), RunFolder(run), say=said.append, **which)
    export_run(run, output, weights=stored)
    return said


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    """A run of three stages whose checkpoints all are kept."""
    return keep(data, tmp_path_factory.mktemp("kept"), 2, "bf16")


def keep(data, folder, zero, precision):
    content = quick(small.recipe(data, folder / "run", **STAGES), zero=zero, precision=precision)
    with mock.patch.object(StageFolder, "prune", lambda *_: None):
        many.train(str(small.write(folder, content)), [])
    return folder / "run"


def same_as_training(run, folder):
    for index, stage in enumerate(STAGES):
        exported(run, folder / stage, stage=stage, step=4)
        assert files(folder / stage) == files(RunFolder(run).stage(index, stage).export), stage


def test_it_is_what_training_writes(kept, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in kept.rglob("*"))
    same_as_training(kept, tmp_path)
    assert sorted((path, path.stat().st_mtime_ns) for path in kept.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_it_is_what_training_writes_at_every_stage_of_zero(data, tmp_path, zero, precision):
    same_as_training(keep(data, tmp_path, zero, precision), tmp_path)


@pytest.fixture
def unfinished(kept, tmp_path):
    """The run while its second stage goes on."""
    run = shutil.copytree(kept, tmp_path / "run")
    shutil.rmtree(run / "stages" / "03-encoder")
    shutil.rmtree(run / "stages" / "02-lora" / "export")
    (run / "stages" / "02-lora" / "done.json").unlink()
    return run


def lclm(*arguments):
    """The command's exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_the_command(unfinished, kept, tmp_path, capsys):
    newest, half, out = tmp_path / "newest", tmp_path / "half", tmp_path / "out"
    assert lclm("export", unfinished, "--step", "newest", "-o", newest) == 0
    assert "exporting step-00000004 of stage lora" in capsys.readouterr().out
    assert weight_files(newest) == weight_files(kept / "stages" / "02-lora" / "export")
    assert lclm("export", unfinished, "--stage=lora", "--step=2", "--dtype=bfloat16", "-o", half) == 0
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    for wrong, said in {
        ("--step=7",): "no checkpoint of step 7; the nearest is 4. There are: 2, 4",
        ("--step=newest", "--stage=lore"): "did you mean 'lora'",
        ("--step=last",): "give the number of a stage's step, or newest",
    }.items():
        capsys.readouterr()
        assert lclm("export", unfinished, *wrong, "-o", out) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_run_may_remove_what_is_being_exported(unfinished, kept, tmp_path):
    run = RunFolder(unfinished)
    stored = open_checkpoint(Recipe.read(run.recipe), run)
    run.stage(1, "lora").prune(0)
    export_run(unfinished, tmp_path / "out", weights=stored)
    assert weight_files(tmp_path / "out") == weight_files(kept / "stages" / "02-lora" / "export")
    with pytest.raises(ValueError, match="holds no checkpoints: a complete stage has its export only"):
        open_checkpoint(Recipe.read(run.recipe), run, stage="lora", step=4)


def test_damage_is_named_and_passed_over(unfinished, tmp_path):
    folder = RunFolder(unfinished).stage(1, "lora")
    path = next(folder.checkpoint(4).rglob("*_optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged.*{path.name} is not the file that was written"):
        exported(unfinished, tmp_path / "out", step=4)
    said = exported(unfinished, tmp_path / "out")
    assert "step-00000004 is damaged and is not used" in said[1]
    assert "exporting step-00000002 of stage lora" in said
    assert folder.checkpoint(4).is_dir()


def test_other_frozen_weights_are_refused(unfinished, kept, tmp_path):
    start = unfinished / "stages" / "01-joint" / "export"
    shutil.copy(kept / "stages" / "03-encoder" / "export" / "model.safetensors", start)
    with pytest.raises(ValueError, match="frozen weights that its stage starts from are not those"):
        exported(unfinished, tmp_path / "out")


@pytest.mark.slow
def test_frozen_weights_come_from_what_the_recipe_names(data, tmp_path):
    """The first stage's encoder and decoder from checkpoints of their own; and parts that training builds."""
    released, apart = tmp_path / "released", {"tie_embeddings": False, "position_in_block": False}
    model = small.recipe(data, tmp_path / "made")["model"] | apart
    settings = build_settings(ModelSettings, [("test", model)])
    build_model(settings, seed=5).save_pretrained(released, layout="released")
    build_processor(settings).save_pretrained(released, layout="released")
    for name, learn, said_so in (("parts", ("adapter", "brackets"), False), ("built", ("encoder",), True)):
        content = quick(small.recipe(data, tmp_path / name, first=small.stage(2, learn=learn)), zero=1)
        content["model"] = model | {part: {"path": str(released / part)} for part in ("encoder", "decoder")}
        with mock.patch.object(StageFolder, "prune", lambda *_: None):
            many.train(str(small.write(tmp_path, content)), [])
        said = exported(tmp_path / name, tmp_path / f"{name}-out", step=2)
        assert files(tmp_path / f"{name}-out") == files(tmp_path / name / "export")
        assert any("built in memory" in text for text in said) == said_so


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_state_is_one_export(data, tmp_path):
    """One training state, moved from 1 process at ZeRO 1 through all the others to 4 at ZeRO 3."""
    places = list(itertools.product(("fp32", "bf16"), SIZES, ZEROS))
    recipes, source = {}, {}
    for precision in ("fp32", "bf16"):
        content = quick(small.recipe(data, tmp_path / precision, joint=joint()), precision=precision, zero=1)
        content["data"] |= {"micro_batch": 1, "pack": {"positions": 96, "rows": 3, "latents": 30}}
        recipes[precision], source[precision] = str(small.write(tmp_path, content)), str(tmp_path / precision)
    for size in SIZES:
        jobs = [train_job(recipes[p], tmp_path / p, stop=3) for p in recipes] if size == 1 else []
        for precision, _, zero in (place for place in places if place[1] == size):
            target = str(tmp_path / f"{precision}-{size}-{zero}")
            move = {"source": source[precision], "target": target, "zero": zero}
            jobs.append({"do": "carry_on", "recipe": recipes[precision], **move})
            source[precision] = target
        launch(tmp_path, size, jobs)
    for precision in recipes:
        exported(tmp_path / precision, tmp_path / f"{precision}-out")
        expected = weight_files(tmp_path / f"{precision}-out")
        for _, size, zero in (place for place in places if place[0] == precision):
            run = tmp_path / f"{precision}-{size}-{zero}"
            exported(run, run / "out")
            assert weight_files(run / "out") == expected, run.name


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_memory_is_that_of_a_few_shards(data, tmp_path, zero):
    """Two processes' checkpoint of a model of 400 MiB, all of which learns."""
    content = quick(small.recipe(data, tmp_path / "run", first=small.stage(4)), zero=zero)
    large = small.LAYERS | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    content["model"] |= {"encoder": {"config": large}, "tie_embeddings": False}
    content["model"]["decoder"]["config"] = large
    path = str(small.write(tmp_path, content))
    run = str(tmp_path / "run")
    launch(tmp_path, 2, [{"do": "carry_on", "recipe": path, "source": None, "target": run, "zero": zero}])
    shard = 30 * 2**20
    assert peak.measure(tmp_path / "run", tmp_path / "out", "native", shard) < 3 * shard
