"""What must not grow or change with the number of processes, shards, or steps done."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lclm.data import index
from lclm.data.batch import Loader, make_lanes
from lclm.data.settings import DataSettings, PackSettings, TaskSettings
from lclm.data.shards import DataSet, Shard, write_manifest
from lclm.recipe import load_recipe
from tests.data import material
from tests.data.test_batch import data_settings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def reading() -> dict:
    tokenizer = material.span_tokenizer("bytes")
    return {"tokenizer": tokenizer, "geometry": material.geometry(tokenizer, ratio=4, window=64)}


def test_sixteen_ranks_make_the_batches_of_one(stdlib, needles):
    from fleet import Fleet

    settings = data_settings(stdlib, needles, lanes=16, lookahead=4, micro_batch=1)
    whole = Fleet(settings, world=16, **reading())
    steps = [whole.step(saves=[5]), whole.step(stops=[0])]
    state = json.loads(json.dumps(whole.state()))
    steps.append(whole.step())
    assert [(step.tally.save, step.tally.stop) for step in steps] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert all(len(step.decisions) == 1 for step in steps)
    assert len({digest for step in steps for digest in step.digests.values()}) == 48
    for world in (1, 4):
        fleet = Fleet(settings, world=world, **reading())
        made = [fleet.step() for _ in steps]
        assert [step.digests for step in made] == [step.digests for step in steps]
        assert made[0].tally.totals == steps[0].tally.totals | {"save": 0}
        assert Fleet(settings, world=world, state=state, **reading()).step().digests == steps[2].digests


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Settings that read 5,000 shards of 1,024 samples, all of them the same file."""
    from resuming import stretch
    from simulated import ByteTokenizer, geometry

    folder = tmp_path_factory.mktemp("many")
    tokenizer = ByteTokenizer(folder / "tokenizer")
    data = load_recipe("recipes/0.6b-4b/16x.yaml").data
    data = replace(data, lanes=64, sources=stretch(folder, 5_000), heldout={}, workers=0)
    return data, tokenizer, geometry(tokenizer)


def test_going_on_costs_the_same_reads_wherever(many):
    from resuming import measure_resume

    rows = measure_resume(*many, world=64)
    assert {row["shards"] for row in rows} == {10_000} and rows[0]["samples"] == 10_240_000
    beginning, *resumed = rows
    held = 64 + 2 * 16
    for row in resumed:
        assert row["reads of shards"] <= beginning["reads of shards"] + 16 < held
        assert row["reads of indexes"] <= beginning["reads of indexes"] + 16
        assert row["bytes of indexes"] <= row["reads of indexes"] * (index.PAGE * 32 + index.HEADER)
        assert row["bytes of shards"] <= 3 * beginning["bytes of shards"]


def test_a_manifest_is_read_once_for_a_loader_and_its_lanes(many):
    from resuming import counting

    data, tokenizer, geometry = many
    with counting() as counts, Loader(data, tokenizer, geometry, seed=0, world=16) as loader:
        next(loader)
    assert counts["json reads"] == len(data.sources)


def many_shards(folder: Path, sizes: list[int]) -> DataSet:
    shards = [Shard(f"s{n}.tar", size, 1, 1, "0" * 64, f"s{n}.npy", "é") for n, size in enumerate(sizes)]
    write_manifest(str(folder), name="x", kind="documents", split="train", shards=shards)
    found = DataSet.open(str(folder))
    assert list(found.shards) == shards and found.shards[-2:] == shards[-2:]
    assert "shards" not in found.manifest
    return found


@pytest.mark.parametrize("run_samples", [1, 3, 7, 100])
def test_every_run_and_sample_is_found(tmp_path, run_samples):
    sizes = [5, 0, 7, 1, 0, 100, 3, 0]
    found = many_shards(tmp_path, sizes)
    runs = [
        (shard, start, min(size, start + run_samples))
        for shard, size in enumerate(sizes)
        for start in range(0, size, run_samples)
    ]
    assert [found.run(number, run_samples) for number in range(found.runs(run_samples))] == runs
    places = [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]
    assert [found.locate(sample) for sample in range(found.num_samples)] == places
    for number in (-1, len(runs)):
        with pytest.raises(ValueError, match="no run"):
            found.run(number, run_samples)


def test_indexes_are_read_in_parts_and_few_are_kept(tmp_path, monkeypatch):
    from resuming import COUNTED, counting

    monkeypatch.setattr(index, "PAGE", 8)
    monkeypatch.setattr(index, "PAGES", 4)
    texts = [f"text number {n} " * 5 for n in range(100)]
    folder = material.write_documents(tmp_path / "d", texts, 1 << 20)
    found = DataSet.open(f"{COUNTED}://{folder}")
    with counting() as counts:
        assert [sample.text for sample in found.read(0, 30, 34)] == texts[30:34]
        assert counts["npy reads"] == 2 and counts["npy bytes"] == 2 * 8 * 32
        found.read(0, 31, 33)
        assert counts["npy reads"] == 2
        assert [sample.text for sample in pickle.loads(pickle.dumps(found))] == texts
        assert [sample.text for sample in found] == texts
    assert len(found._pages._pages) == 4
    assert found.text_bytes(0).tolist() == [len(text) for text in texts]


def squares(pack, geometry) -> int:
    return sum(geometry.size(example).positions ** 2 for example in pack.examples)


@pytest.mark.parametrize("mixture", [{"interleave": 1.0}, {"plain": 1.0}, {"interleave": 0.6, "chat": 0.4}])
def test_attention_is_bounded_and_packs_stay_full(web, needles, mixture):
    shape = PackSettings(4096, 48, 900, attention=500)
    tasks = {
        "interleave": TaskSettings("interleave", "documents", ratios=[4, 8], min_span=64, max_span=512),
        "plain": TaskSettings("plain", "documents"),
        "chat": TaskSettings("chat", "conversations", ratios=[4, 8]),
    }
    settings = data_settings(web, needles, lanes=1, mixture=mixture, pack=shape, tasks=tasks)
    tokenizer, geometry = reading().values()
    packs = {}
    for attention in (None, 500):
        shape = replace(shape, attention=attention)
        (lane,) = make_lanes(replace(settings, pack=shape), tokenizer, geometry, [0], seed=0, mixture=mixture)
        packs[attention] = [lane.next_pack() for _ in range(12)]
    work = {key: [squares(pack, geometry) / 4096 for pack in made] for key, made in packs.items()}
    assert max(work[None]) > 1000 and max(work[500]) <= 500
    for made in packs.values():
        assert sum(pack.used[0] for pack in made) >= 0.99 * 4096 * len(made)


def test_conversations_alone_fill_positions_and_rows_evenly(tmp_path):
    from simulated import ByteTokenizer, Texts, geometry, write

    tokenizer = ByteTokenizer(tmp_path / "tokenizer")
    talks = write(tmp_path / "talks", "conversations", Texts().conversations(1500, mean=6.2, spread=0.9))
    shape = PackSettings(4096, 36, 900)
    settings = DataSettings(
        lanes=8, sources={"talks": talks}, tasks={"chat": TaskSettings("chat", "talks")}, lookahead=64,
        pack=shape, mixture={"chat": 1.0},
    )  # fmt: skip
    read = {"tokenizer": tokenizer, "geometry": geometry(tokenizer, window=256)}
    lanes = make_lanes(settings, **read, numbers=range(8), seed=0, mixture=settings.mixture)
    steps = [[lane.next_pack() for lane in lanes] for _ in range(10)]
    for number, whole in ((0, shape.positions), (1, shape.rows * 256)):
        filled = np.array([[pack.used[number] / whole for pack in step] for step in steps[2:]])
        worst = filled.max(1) / filled.mean(1)
        assert filled.mean() >= 0.95 and np.median(worst) <= 1.035
    (again,) = make_lanes(
        settings, **read, numbers=[3], seed=0, mixture=settings.mixture,
        cursors={"3": json.loads(json.dumps(steps[6][3].cursor))},
    )  # fmt: skip
    for step in steps[7:]:
        assert [e.key for e in again.next_pack().examples] == [e.key for e in step[3].examples]


def test_a_long_conversation_is_packed_whatever_the_bound(tmp_path, stdlib):
    long = [
        {"role": "user", "content": [{"type": "memory", "text": "m" * 64}, {"type": "text", "text": "why?"}]},
        {"role": "assistant", "content": "x" * 1500},
    ]
    short = material.conversations(6, mean=2.6, spread=0.1)
    talks = material.write_conversations(tmp_path / "c", [*short, long])
    mixture, shape = {"plain": 0.5, "chat": 0.5}, PackSettings(2048, 8, 200, attention=100)
    settings = data_settings(stdlib, talks, lanes=1, mixture=mixture, pack=shape, epochs=1)
    (lane,) = make_lanes(settings, *reading().values(), [0], seed=0, mixture=mixture)
    packs = [lane.next_pack() for _ in range(8)]
    (holding,) = [pack for pack in packs if any(e.key == "c00006" for e in pack.examples)]
    assert holding.examples[0].key == "c00006" and holding.used[0] >= 2000
    others = [pack for pack in packs if pack is not holding]
    assert all(squares(pack, reading()["geometry"]) <= 100 * 2048 for pack in others)
    assert lane.dropped == {}


def test_another_bound_goes_on_in_the_data_with_shares_counted_anew(stdlib, needles):
    settings = data_settings(stdlib, needles)
    first = Loader(settings, **reading(), seed=0)
    next(first)
    state = first.state()
    assert state["pack"] == [256, 4, 80]
    bounded = replace(settings, pack=replace(settings.pack, attention=100))
    second = Loader(bounded, **reading(), seed=0, cursor=state)
    assert {cursor["packs"] for cursor in second.state()["cursors"].values()} == {0}
    assert second.state()["pack"] == [256, 4, 80, 100]


@pytest.mark.parametrize("attention", [0, 63, 4096, 9999])
def test_a_bound_without_effect_or_sense_is_refused(attention):
    with pytest.raises(ValueError, match="attention"):
        PackSettings(attention=attention).validate()
