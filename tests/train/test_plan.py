"""What a plan says: counts, bytes and operations that can be reckoned by hand, and proposals that hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lclm.cli import main
from lclm.recipe import load_recipe
from lclm.train.planning import rehearsal
from lclm.train.planning.hardware import GIB, MACHINES, Machine, find_machine
from lclm.train.planning.memory import Engine, Weights, memory
from lclm.train.planning.page import markdown
from lclm.train.planning.plan import Cluster, Planner, make_plan, needed_disk, traffic
from lclm.train.planning.rehearsal import Rehearsed
from lclm.train.settings import ActivationCheckpointing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYERS = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
NOTHING = Rehearsed(0.0, 0.0, 0.0, {}, {})


@pytest.fixture
def path(tmp_path):
    """A recipe with configurations and nothing else: no data, no tokenizers, no weights."""
    learn = {name: {"lr": 1e-3} for name in ("encoder", "adapter", "decoder", "brackets")}
    content = {
        "name": "planned",
        "model": {
            "encoder": {"config": LAYERS | {"num_hidden_layers": 5}},
            "decoder": {"config": LAYERS | {"num_hidden_layers": 6}},
            "ratio": 4,
            "window": 64,
            "pooling": "mean",
            "encoder_attention": "causal",
            "adapter": "mlp",
        },
        "data": {
            "lanes": 16,
            "micro_batch": 2,
            "pack": {"positions": 512, "rows": 8, "latents": 128},
            "sources": {"documents": {"path": str(tmp_path / "nowhere")}},
            "tasks": {"interleave": {"task": "interleave", "source": "documents", "max_span": 64}},
            "mixture": {"interleave": 1.0},
        },
        "stages": {
            "order": ["adapter", "joint"],
            "adapter": {"learn": {"adapter": {"lr": 1e-3}, "brackets": {"lr": 1e-3}}, "tokens": 1e6},
            "joint": {"learn": learn, "steps": 100},
        },
        "engine": {"zero": 1, "precision": "bf16"},
    }
    file = tmp_path / "planned.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def rehearsed(path, *overrides, stage="joint", encoder=False, decoder=False, machine="h100"):
    recipe = load_recipe(path, overrides)
    planner = Planner(recipe, Cluster(MACHINES[machine], per_node=4))
    return planner.rehearse(recipe, stage, ActivationCheckpointing(encoder, decoder))


def test_parameters_of_the_released_models_are_exact():
    planner = Planner(load_recipe("recipes/0.6b-4b/16x.yaml"), Cluster(MACHINES["h100"]))
    assert planner.counts == {
        "encoder": 595_776_512,
        "adapter": 9_181_184,
        "decoder": 4_022_468_096,
        "brackets": 5_120,
    }


def test_flops_are_those_of_the_products(path):
    """Six per weight and token where all learns, and attention: 12 per head dimension and visible pair."""
    found = rehearsed(path)
    layer = 64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 128
    for part, layers, tokens, length in (("encoder", 5, 2 * 8 * 64, 64), ("decoder", 6, 2 * 512, 512)):
        attention = 12 * 4 * 16 * tokens * length / 2
        assert found.flops[part] == pytest.approx(layers * (6 * layer * tokens + attention))
    assert found.flops["loss"] == pytest.approx(6 * 512 * 64 * 2 * 511)


def test_what_is_frozen_costs_less(path):
    all_learn, frozen = rehearsed(path), rehearsed(path, stage="adapter")
    assert frozen.flops["encoder"] == pytest.approx(all_learn.flops["encoder"] / 3)
    own_weights = 2 * 6 * 512 * 2 * (64 * 12 * 16 + 3 * 64 * 128)
    assert all_learn.flops["decoder"] - frozen.flops["decoder"] == pytest.approx(own_weights)
    assert frozen.activations < all_learn.activations
    again = rehearsed(path, stage="adapter", encoder=True)
    assert again.flops == frozen.flops


def test_checkpointing_recomputes_and_saves(path):
    plain, both = rehearsed(path), rehearsed(path, encoder=True, decoder=True)
    assert both.activations < 0.5 * plain.activations
    for part in ("encoder", "decoder"):
        more = (both.flops[part] - plain.flops[part]) / plain.forward[part]
        assert 0.7 < more <= 1.0
    one = rehearsed(path, decoder=True)
    assert both.activations < one.activations < plain.activations


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_few_layers_tell_what_all_of_them_hold(path, monkeypatch, checkpointing, zero):
    options = {"encoder": checkpointing, "decoder": checkpointing}
    overrides = (f"engine.zero={zero}", "data.lanes=8")
    told = rehearsed(path, *overrides, **options)
    monkeypatch.setattr(rehearsal, "LONG", 100)
    whole = rehearsed(path, *overrides, **options)
    assert told.flops == pytest.approx(whole.flops)
    sums = [found.activations + found.gradients + found.at_first for found in (told, whole)]
    assert sums[0] == pytest.approx(sums[1], rel=0.01)


def test_attention_with_a_dense_mask_holds_and_computes_more(path):
    blocks, dense = rehearsed(path), rehearsed(path, "model.attention=sdpa")
    eager = rehearsed(path, "model.attention=eager")
    assert blocks.activations < dense.activations < eager.activations
    assert blocks.flops["decoder"] < dense.flops["decoder"]


def engine(zero, processes, **options):
    settings = {"bf16": True, "accumulation": 1, "bucket": 1000, "overlap": False}
    return Engine(zero=zero, processes=processes, **(settings | options))


def test_zero_cuts_what_it_says():
    weights = Weights(1_000_000, (600_000, 200_000), largest=1000)
    parts = {zero: memory(weights, engine(zero, 8), NOTHING).parts for zero in range(4)}
    assert parts[0]["optimizer moments"] == 8 * parts[1]["optimizer moments"] == 6_400_000
    assert parts[0]["fp32 masters"] == 8 * parts[2]["fp32 masters"] == 3_200_000
    assert parts[2]["parameters"] == 8 * parts[3]["parameters"] == 2_000_000
    assert memory(weights, engine(1, 8), NOTHING).total > memory(weights, engine(2, 8), NOTHING).total
    offloaded = memory(weights, engine(3, 8, offload=True), NOTHING)
    assert "optimizer moments" not in offloaded.parts
    assert offloaded.host > 12 * 100_000


def test_muon_keeps_one_moment():
    weights = Weights(1000, (600, 400), muon=600)
    assert memory(weights, engine(0, 1), NOTHING).parts["optimizer moments"] == 8 * 1000 - 4 * 600


def test_traffic():
    weights, cluster = Weights(100, (80,)), Cluster(MACHINES["h100"], nodes=2, per_node=2)
    sent = {zero: traffic(weights, engine(zero, 4, accumulation=3), cluster) for zero in range(4)}
    assert sent[0].reduced == pytest.approx(2 * 2 * 80 * 3 / 4)
    assert sent[1].reduced == pytest.approx(2 * 4 * 80 * 3 / 4)
    assert sent[2].reduced == 3 * sent[1].reduced
    assert sent[2].gathered == pytest.approx(2 * 80 * 3 / 4)
    assert sent[3].reduced == sent[2].reduced / 2
    assert sent[3].gathered == pytest.approx(3 * 2 * 2 * 100 * 3 / 4)


def test_what_does_not_fit_comes_with_settings_that_do(path):
    """The proposal's settings, given as overrides, make a recipe that fits by a plan of its own."""
    full = Planner(load_recipe(path), Cluster(MACHINES["h100"], per_node=4))
    need = full.memory("joint").total
    least = None
    for share in (0.9, 0.6, 0.3):
        machine = Machine("small", share * need, 1e12, 1e12, 1e9, reserve=0.0, spare=0.0)
        planned = Planner(load_recipe(path), Cluster(machine, per_node=4)).stage("joint")
        assert planned.proposal is not None
        assert planned.proposal.fits
        changed = load_recipe(path, planned.proposal.settings)
        found = Planner(changed, Cluster(machine, per_node=4)).memory("joint").total
        assert found == pytest.approx(planned.proposal.memory)
        assert found <= machine.usable
        assert least is None or len(planned.proposal.settings) >= least
        least = len(planned.proposal.settings)


def test_what_cannot_fit_says_so(path):
    machine = Machine("tiny", 1000.0, 1e12, 1e12, 1e9, reserve=0.0, spare=0.0)
    planned = Planner(load_recipe(path), Cluster(machine)).stage("joint")
    assert planned.proposal is not None
    assert not planned.proposal.fits


def test_the_page(path):
    plan = make_plan(load_recipe(path), Cluster(MACHINES["a100-80"], nodes=3, per_node=8, price=2.0))
    assert plan.problems == [
        "16 lanes do not divide over 24 processes with data.micro_batch=2: set data.lanes=48 (figures are "
        "for it)"
    ]
    page = markdown(plan)
    assert "set data.lanes=48" in page
    assert "| joint | 100 |" in page
    assert "A100" in page
    joint = plan.stages[1]
    assert joint.hours == pytest.approx(100 * joint.seconds / 3600)
    assert plan.machine_hours == pytest.approx(24 * sum(stage.hours for stage in plan.stages))
    assert plan.stages[0].steps == -(-1_000_000 // int(plan.stages[0].tokens))
    assert joint.checkpoint == 14 * joint.weights.learning
    assert plan.disk == needed_disk(load_recipe(path, ["data.lanes=48"]), 24)
    assert plan.shards >= plan.lanes == 48
    assert "nowhere is not a data set" in page


def test_machines():
    assert find_machine("h100").bf16 == 989e12
    own = find_machine("mine", 24, 100)
    assert (own.memory, own.peak("bf16")) == (24 * GIB, 100e12)
    assert find_machine("h100", memory_gib=40).memory == 40 * GIB
    with pytest.raises(ValueError, match="--gpu-memory"):
        find_machine("mine")


def run_plan(*words):
    """The command, to its exit code 0."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    assert not ended.value.code


def test_a_stage_within_its_warm_up_is_named(path):
    recipe = load_recipe(path, ["stages.joint.schedule.warmup_steps=100"])
    (problem,) = make_plan(recipe, Cluster(find_machine("cpu"))).problems
    assert problem.startswith("stage joint ends after 100 steps, within its 100 warm-up steps")


@pytest.mark.slow
def test_the_command_plans_the_released_models(tmp_path, capsys):
    page = tmp_path / "plan.md"
    options = ["--nodes", "32", "--gpu", "h100", "--price", "2.5", "-o", str(page)]
    run_plan("recipes/0.6b-4b/16x.yaml", *options)
    shown = capsys.readouterr().out
    assert "4,022,468,096" in shown
    assert "It fits" in shown
    assert "do not divide" not in shown
    assert "| total | 4,627,430,912 |" in page.read_text()
    run_plan("recipes/0.6b-4b/16x.yaml", "data.lanes=128", "--nodes", "32")
    assert "set data.lanes=256" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", ["all learn", "decoder frozen, checkpointing", "ZeRO 2", "ZeRO 3"])
def test_memory_is_what_is_measured(case, tmp_path, monkeypatch):
    """In processes of their own, within 10% of the most resident memory that steps add."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory as benchmark

    found = benchmark.compare("small", case, tmp_path)
    assert found["predicted / measured"] == pytest.approx(1.0, abs=0.1), found
