from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lclm.data.batch import Loader, merge_states
from lclm.data.settings import DataSettings, PackSettings, SourceSettings, TaskSettings
from tests.data import material

TASKS = {
    "interleave": TaskSettings("interleave", "documents", min_span=64, max_span=256),
    "plain": TaskSettings("plain", "documents"),
    "chat": TaskSettings("chat", "conversations"),
}


def data_settings(documents: str, conversations: str, **changes) -> DataSettings:
    settings = DataSettings(
        lanes=4,
        micro_batch=2,
        workers=0,
        run_samples=4,
        lookahead=8,
        pack=PackSettings(256, 4, 80),
        sources={"documents": SourceSettings(documents), "conversations": SourceSettings(conversations)},
        tasks=TASKS,
        mixture={"interleave": 0.6, "plain": 0.1, "chat": 0.3},
    )
    return replace(settings, **changes)


def loader(settings: DataSettings, **options) -> Loader:
    tokenizer = material.span_tokenizer("bytes")
    geometry = material.geometry(tokenizer, ratio=4, window=64)
    return Loader(settings, tokenizer, geometry, **{"seed": 3, "ratios": [4, 8]} | options)


def take(source: Loader, steps: int):
    with source:
        return [next(source) for _ in range(steps)]


def rows(steps) -> list[list[tuple]]:
    """Each step as its packs in the order of lanes, whatever the micro-batches."""
    found = []
    for step in steps:
        packs = []
        for batch in step:
            for row, lane in enumerate(batch.lanes):
                arrays = {k: batch.arrays[k][row].tolist() for k in ("input_ids", "labels", "position_ids")}
                packs.append((lane, batch.keys[row], arrays))
        found.append(sorted(packs, key=lambda pack: pack[0]))
    return found


def equal(steps, others) -> bool:
    return len(steps) == len(others) and all(
        a.keys == b.keys
        and torch.equal(a.task_ids, b.task_ids)
        and all(torch.equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
        for step, other in zip(steps, others, strict=True)
        for a, b in zip(step, other, strict=True)
    )


@pytest.fixture
def settings(stdlib, needles) -> DataSettings:
    return data_settings(stdlib, needles)


def test_batches_have_fixed_shapes_and_count_what_they_hold(settings):
    for step in take(loader(settings), 6):
        assert len(step) == 2 and not step.empty
        for batch in step:
            arrays = batch.arrays
            assert arrays["input_ids"].shape == arrays["latent_index"].shape == (2, 256)
            assert arrays["encoder_input_ids"].shape == arrays["block_index"].shape == (8, 64)
            assert arrays["memory_sizes"].shape == (160,) and batch.num_latents == 160
            assert "attention_mask" not in arrays
            assert {array.dtype for array in arrays.values()} == {torch.int64}
            assert batch.loss_tokens == int((arrays["labels"] != -100).sum())
            assert batch.row_tokens == int((arrays["encoder_window_ids"] >= 0).sum())
            assert batch.latents_used == int(arrays["memory_sizes"].sum())
            assert (
                int(arrays["latent_index"].max())
                == int(arrays["block_index"].max())
                == batch.latents_used - 1
            )
            assert batch.capacity == (512, 8 * 64, 160)
            assert set(batch.source_tokens) <= set(TASKS)
        assert step.source_tokens > 0 and step.loss_tokens == sum(batch.loss_tokens for batch in step)
        json.dumps(step.keys)


def test_task_ids_follow_the_labels(settings):
    for step in take(loader(replace(settings, mixture={"plain": 1.0})), 2):
        assert all(batch.task_names[int(i)] == "plain" for batch in step for i in batch.task_ids)
    names = set()
    for step in take(loader(settings), 8):
        names |= {batch.task_names[int(i)] for batch in step for i in batch.task_ids}
    assert names == set(TASKS)


def test_any_number_of_workers_gives_the_same_batches(settings):
    expected = take(loader(settings), 6)
    for workers in (1, 2, 3):
        source = loader(replace(settings, workers=workers))
        assert source.workers == {1: 1, 2: 2, 3: 2}[workers]
        assert equal(take(source, 6), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_any_world_size_gives_the_same_packs(settings, world):
    settings = replace(settings, micro_batch=1)
    expected = rows(take(loader(settings), 5))
    parts = [rows(take(loader(settings, rank=rank, world=world), 5)) for rank in range(world)]
    assert [[pack for part in parts for pack in part[step]] for step in range(5)] == expected


def test_a_run_resumed_from_any_step_goes_on_the_same(settings):
    source = loader(settings)
    steps, states = [], [source.state()]
    for _ in range(8):
        steps.append(next(source))
        states.append(json.loads(json.dumps(source.state())))
    for stop in (0, 1, 4, 7):
        for workers in (0, 2):
            again = loader(replace(settings, workers=workers), cursor=states[stop])
            assert equal(take(again, 8 - stop), steps[stop:])


def test_resuming_at_another_world_size_needs_all_lanes(settings):
    settings = replace(settings, micro_batch=1)
    expected = rows(take(loader(settings), 6))[3:]
    halves = [loader(settings, rank=rank, world=2) for rank in (0, 1)]
    for half in halves:
        take(half, 3)
    state = merge_states([half.state() for half in halves])
    assert list(state["cursors"]) == ["0", "1", "2", "3"]
    assert rows(take(loader(settings, cursor=state), 3)) == expected
    with pytest.raises(ValueError, match="lacks lane"):
        loader(settings, cursor=halves[0].state())
    with pytest.raises(ValueError, match="differ"):
        merge_states([halves[0].state(), halves[1].state() | {"seed": 9}])


def test_prefetched_packs_are_not_in_the_state(settings):
    plain, ahead = loader(settings), loader(replace(settings, workers=2, prefetch=4))
    with ahead:
        for _ in range(3):
            next(plain), next(ahead)
            time.sleep(0.05)
            assert plain.state() == ahead.state()


def test_a_stage_with_its_own_mixture_and_pack_goes_on_in_the_data(settings):
    first = loader(settings)
    take(first, 3)
    second = loader(settings, mixture={"plain": 1.0}, pack=PackSettings(128, 1, 40), cursor=first.state())
    steps = take(second, 2)
    assert steps[0].micro_batches[0].arrays["input_ids"].shape == (2, 128)
    turns = {lane: cursor["sources"]["conversations"] for lane, cursor in first.state()["cursors"].items()}
    assert {lane: c["sources"]["conversations"] for lane, c in second.state()["cursors"].items()} == turns


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lanes": 8}, "lanes 4"), ({"run_samples": 8}, "run_samples 4"), ({"seed": 1}, "seed 3")],
)
def test_a_cursor_of_another_run_is_refused(settings, changes, message):
    source = loader(settings)
    next(source)
    options = {"seed": changes.pop("seed")} if "seed" in changes else {}
    with pytest.raises(ValueError, match=message):
        loader(replace(settings, **changes), cursor=source.state(), **options)


def test_a_cursor_of_other_data_is_refused(settings, tmp_path):
    source = loader(settings)
    next(source)
    other = SourceSettings(material.write_documents(tmp_path / "other", material.stdlib_texts(9)))
    changed = replace(settings, sources=settings.sources | {"documents": other})
    with pytest.raises(ValueError, match="fingerprint"):
        loader(changed, cursor=source.state())


def test_one_epoch_drains_with_empty_packs(tmp_path, needles):
    texts = [text[:1500] for text in material.stdlib_texts(10)]
    documents = material.write_documents(tmp_path / "few", texts)
    settings = data_settings(documents, needles, mixture={"plain": 1.0}, epochs=1, workers=2)
    with loader(settings) as source:
        steps = [next(source) for _ in range(40)]
    assert not steps[0].empty and steps[-1].empty
    batch = steps[-1].micro_batches[0]
    assert batch.loss_tokens == batch.positions == batch.row_tokens == 0
    assert batch.arrays["input_ids"].shape == (2, 256) and (batch.arrays["labels"] == -100).all()
    assert (batch.arrays["encoder_window_ids"] == -1).all()


def test_a_source_of_the_wrong_kind_says_so(settings):
    tasks = TASKS | {"plain": TaskSettings("plain", "conversations")}
    with pytest.raises(ValueError, match="reads documents, but source 'conversations' holds conversations"):
        take(loader(replace(settings, tasks=tasks)), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named(tmp_path, needles, workers):
    documents = material.write_documents(tmp_path / "bad", material.stdlib_texts(20))
    shard = Path(documents) / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    settings = data_settings(documents, needles, mixture={"plain": 1.0}, workers=workers)
    steps = take(loader(settings), 40)
    assert f"{shard} (shard cut short)" in [note for step in steps for note in step.damage]
    assert sum(step.dropped.get("documents: shard cut short", 0) for step in steps) > 0
    for file in shard.parent.glob("*.tar"):
        file.unlink()
    with pytest.raises(ValueError, match=r"documents: shard missing .*shard-0.*\.tar is missing") as error:
        take(loader(settings), 40)
    assert "Traceback" not in str(error.value)


PARENT = """
import sys
from tests.data.test_batch import data_settings, loader
source = loader(data_settings({!r}, {!r}, workers=2))
next(source)
print("pids", *[w.pid for w in source._iterator._workers], flush=True)
sys.stdin.read()
"""


def test_workers_of_a_killed_parent_end(stdlib, needles):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(stdlib, needles)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()[1:]]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    limit = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
