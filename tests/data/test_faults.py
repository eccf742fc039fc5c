"""Damaged, missing and flaky data: what can be read is read in the same order, the rest is counted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lclm.data import reading
from lclm.data.batch import merge_states
from lclm.data.reading import Damaged, damaged_only, pause
from lclm.data.settings import DataSettings, PackSettings, ReadingSettings, SourceSettings, TaskSettings
from lclm.data.shards import DataSet
from lclm.data.verify import verify
from tests.data import material
from tests.data.flaky import FAULTS, Server, seconds, serving
from tests.data.test_batch import data_settings, equal, loader, take

QUICK = ReadingSettings(retries=4, wait_seconds=0.001, timeout_seconds=20.0)
DOCUMENTS = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    texts = [
        f"{number} " + text[: 200 + 37 * number] for number, text in enumerate(material.words()[:DOCUMENTS])
    ]
    texts = [text * (1 + number % 40) for number, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("documents") / "train"
    material.write_documents(folder, texts, max_bytes=30_000)
    assert len(DataSet.open(str(folder)).shards) >= 3
    return folder


def plain(path: str | Path, **changes) -> DataSettings:
    """One epoch of documents, as plain text."""
    return DataSettings(
        **{
            "lanes": 4,
            "workers": 0,
            "run_samples": 4,
            "lookahead": 8,
            "epochs": 1,
            "pack": PackSettings(256, 1, 1),
            "reading": replace(QUICK, max_skipped=10_000),
            "sources": {"documents": SourceSettings(str(path))},
            "tasks": {"plain": TaskSettings("plain", "documents")},
            "mixture": {"plain": 1.0},
        }
        | changes
    )


def an_epoch(settings: DataSettings, world: int = 1) -> tuple[list[list[str]], Counter[str], int]:
    """Keys of every step of an epoch over all processes by lane, what was damaged, and what was read."""
    loaders = [loader(settings, rank=rank, world=world) for rank in range(world)]
    steps: list[list[str]] = []
    damaged: Counter[str] = Counter()
    read = 0
    while True:
        parts = [next(one) for one in loaders]
        for part in parts:
            damaged.update(damaged_only(part.dropped))
            read += part.read
        if all(part.empty for part in parts):
            break
        steps.append([key for part in parts for key in part.keys])
    state = merge_states([one.state() for one in loaders])
    total: Counter[str] = Counter()
    for cursor in state["cursors"].values():
        total.update(damaged_only(cursor["dropped"]))
    assert total == damaged and sum(cursor["read"] for cursor in state["cursors"].values()) == read
    for one in loaders:
        one.close()
    return steps, damaged, read


def documents_of(steps: list[list[str]]) -> set[str]:
    return {key.split("@")[0] for step in steps for key in step}


# Damage on disk


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def damage(folder: Path, shard: int, kind: str, sample: int) -> tuple[set[int], str]:
    """Do it; the samples of the shard that it concerns, and the reason."""
    found = DataSet.open(str(folder))
    entry, rows = found.shards[shard], found.index(shard)
    tar, index = folder / entry.file, folder / entry.index
    sample %= len(rows)
    everything = set(range(len(rows)))
    if kind == "flipped":
        flip(tar, int(rows[sample, 0] + rows[sample, 1] // 2))
        return {sample}, reading.CHECKSUM
    if kind == "truncated":
        tar.write_bytes(tar.read_bytes()[: int(rows[sample, 0]) + 7])
        return set(range(sample, len(rows))), reading.CUT_SHORT
    if kind == "missing":
        tar.unlink()
        return everything, reading.MISSING
    if kind == "no index":
        index.unlink()
        return everything, reading.NO_INDEX
    if kind == "nonsense index":
        index.write_bytes(b"nonsense" * 40)
        return everything, reading.BAD_INDEX
    if kind == "short index":
        index.write_bytes(index.read_bytes()[:-3])
        return everything, reading.BAD_INDEX
    if kind == "wild index":
        rows = rows.copy()
        rows[sample, 1] = 1 << 60
        np.save(index, rows)
        return {sample}, reading.BAD_INDEX
    rows = rows.copy()
    rows[sample, 3] ^= 8
    np.save(index, rows)
    return {sample}, reading.CHECKSUM


KINDS = (
    *("flipped", "truncated", "missing", "no index", "nonsense index", "short index", "wild index"),
    "flipped index",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_named_and_the_rest_is_read(whole, tmp_path, kind):
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    expected = [sample.key for sample in DataSet.open(str(whole)).read(1, 0, 99)]
    lost, reason = damage(folder, 1, kind, 5)
    found = DataSet.open(str(folder), QUICK).read_each(1, 0, len(expected))
    assert len(found) == len(expected)
    for place, (item, key) in enumerate(zip(found, expected, strict=True)):
        if place in lost:
            assert isinstance(item, Damaged) and item.reason == reason and "shard-00001." in item.file
        else:
            assert not isinstance(item, Damaged) and item.key == key
    with pytest.raises(ValueError, match=r"shard-00001\."):
        list(DataSet.open(str(folder)))
    with pytest.raises(ValueError, match=r"problems(?s:.*)shard-00001\."):
        verify(str(folder))
    left = [sample.key for sample in DataSet.open(str(folder), QUICK).undamaged()]
    assert len(left) == DOCUMENTS - len(lost)


@examples(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    sample=st.integers(0, 30),
    lanes=st.sampled_from([2, 4]),
    seed=st.integers(0, 3),
)
def test_undamaged_samples_exactly_once_whatever_the_processes(
    whole, tmp_path_factory, kinds, sample, lanes, seed
):
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "train"))
    names = {
        (shard, place): item.key
        for shard, entry in enumerate(DataSet.open(str(whole)).shards)
        for place, item in enumerate(DataSet.open(str(whole)).read(shard, 0, entry.samples))
    }
    lost: dict[str, str] = {}
    for shard, kind in enumerate(kinds):
        places, reason = damage(folder, shard, kind, sample)
        lost |= {names[shard, place]: reason for place in places}
    settings = plain(folder, lanes=lanes)
    runs = [an_epoch(settings), an_epoch(settings, world=2)]
    assert runs[0][1:] == runs[1][1:]
    assert runs[0][0] == runs[1][0]
    steps, damaged, read = runs[0]
    assert documents_of(steps) == set(names.values()) - set(lost)
    assert damaged == Counter(f"documents: {reason}" for reason in lost.values())
    assert read == len(names)


def test_the_same_with_background_processes_and_from_any_step(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    for shard, kind in enumerate(("truncated", "missing", "flipped")):
        damage(folder, shard, kind, 4)
    settings = plain(folder)
    expected = an_epoch(settings)
    assert an_epoch(replace(settings, workers=2)) == expected
    with loader(settings) as source:
        steps, states = [], [source.state()]
        for _ in range(6):
            steps.append(next(source))
            states.append(json.loads(json.dumps(source.state())))
    for stop in (0, 2, 5):
        again = loader(replace(settings, workers=2), cursor=states[stop])
        later = take(again, 6 - stop)
        assert equal(later, steps[stop:])
        assert [step.dropped for step in later] == [step.dropped for step in steps[stop:]]
        assert again.state() == states[6]


def test_a_held_sample_that_is_gone_when_the_run_goes_on_is_left_out(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    settings = plain(folder)
    with loader(settings) as source:
        next(source)
        state = json.loads(json.dumps(source.state()))
    held = sum(len(records) for c in state["cursors"].values() for records in c["held"].values())
    assert held > 0
    for file in folder.glob("*.tar"):
        file.unlink()
    many = [take(loader(replace(settings, workers=workers), cursor=state), 3) for workers in (0, 2)]
    assert equal(*many) and many[0][0].empty
    counts = [sum((Counter(step.dropped) for step in steps), Counter()) for steps in many]
    assert counts[0] == counts[1]
    read = sum(cursor["read"] for cursor in state["cursors"].values())
    assert counts[0]["documents: shard missing"] == DOCUMENTS - read + held


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lane_that_finds_nothing_stops(whole, tmp_path, workers):
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    for file in folder.glob("*.npy"):
        file.unlink()
    settings = plain(folder, epochs=None, workers=workers, reading=QUICK)
    with pytest.raises(ValueError, match=r"documents: index missing \d+\).*max_skipped=32.*is missing"):
        take(loader(settings), 1)


# Reads from afar


def failing(faults: tuple[str, ...], tries: int):
    """Every range is refused `tries` times, with another fault each time. Only samples have checksums."""

    def plan(name: str, before: int) -> str:
        fault = faults[(len(name) * 7 + before) % len(faults)] if before < tries else ""
        return fault if fault != "flip" or name.endswith(".tar") else "503"

    return plan


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "stall"])
def test_a_read_that_fails_is_tried_again(whole, fault):
    with serving(Server(whole, failing((fault,), 2))) as url:
        found = DataSet.open(url, QUICK)
        local = DataSet.open(str(whole))
        assert found.fingerprint == local.fingerprint
        assert found.read(1, 2, 9) == local.read(1, 2, 9)


def test_a_read_that_stalls_is_given_up_and_tried_again(whole):
    server = Server(whole, lambda name, before: "stall" if name.endswith(".tar") and not before else "")
    with serving(server) as url:
        found = DataSet.open(url, replace(QUICK, timeout_seconds=0.5))
        took = seconds(lambda: found.read(0, 0, 4))
    assert found.read_each(0, 0, 0) == []
    assert 0.4 < took < 10 and server.faults["stall"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flaky_server_changes_nothing(whole, needles, workers):
    """Two kinds of data, some of every fault, each range failing up to twice."""
    local = data_settings(str(whole), needles, epochs=2)
    expected = take(loader(local), 6)
    plan = failing(tuple(f for f in FAULTS if f != "stall"), 2)
    server, other = Server(whole, plan), Server(Path(needles), plan)
    with serving(server) as url, serving(other) as second:
        remote = data_settings(url, second, epochs=2, workers=workers, reading=QUICK)
        steps = take(loader(remote), 6)
    assert equal(steps, expected)
    assert not any(damaged_only(step.dropped) for step in steps)
    assert sum(server.faults.values()) > 2 * server.faults[""] > 0


def test_what_stays_unreadable_is_counted_and_costs_one_try_from_then_on(whole):
    def plan(name: str, before: int) -> str:
        return "503" if name == "shard-00001.tar" else ""

    server = Server(whole, plan)
    with serving(server) as url:
        found = DataSet.open(url, QUICK)
        for start in (0, 4, 8):
            items = found.read_each(1, start, start + 4)
            assert {item.reason for item in items if isinstance(item, Damaged)} == {reading.UNREADABLE}
            assert "HTTP status 503" in str(items[0])
        assert server.asked["shard-00001.tar"] == (QUICK.retries + 1) + 1 + 1
        assert found.read(0, 0, 4) == DataSet.open(str(whole)).read(0, 0, 4)
        found.read_each(1, 0, 4)
        assert server.asked["shard-00001.tar"] == 2 * (QUICK.retries + 1) + 1 + 1


@pytest.mark.parametrize(("status", "reason"), [("404", reading.MISSING), ("403", reading.UNREADABLE)])
def test_what_cannot_change_is_not_tried_again(whole, status, reason):
    server = Server(whole, lambda name, before: status if name.endswith(".tar") else "")
    with serving(server) as url:
        (item,) = DataSet.open(url, QUICK).read_each(0, 0, 1)
    assert isinstance(item, Damaged) and item.reason == reason
    assert server.asked["shard-00000.tar"] == 1


def test_a_shard_cut_short_on_the_server(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    lost, reason = damage(folder, 0, "truncated", 3)
    with serving(Server(folder)) as url:
        found = DataSet.open(url, replace(QUICK, retries=1)).read_each(0, 0, 9)
    assert [place for place, item in enumerate(found) if isinstance(item, Damaged)] == list(range(3, 9))
    assert {item.reason for item in found if isinstance(item, Damaged)} == {reason} and 3 in lost


def test_a_server_without_ranges_is_refused(whole):
    with (
        serving(Server(whole, lambda name, before: "whole")) as url,
        pytest.raises(ValueError, match="byte ran"),
    ):
        DataSet.open(url, QUICK).read(0, 0, 2)


def test_a_store_that_is_down_says_so():
    with serving(Server(Path("/nowhere"))) as url:
        pass
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read .*tries: 3.*can be reached"):
        DataSet.open(url, replace(QUICK, retries=2))


def test_pauses_grow_and_vary():
    pauses = [[pause(tried, 0.5) for _ in range(50)] for tried in range(9)]
    for tried, drawn in enumerate(pauses):
        middle = min(reading.LONGEST_WAIT, 0.5 * 2**tried)
        assert all(0.5 * middle <= value <= 1.5 * middle for value in drawn) and len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"retries": -1}, "data.reading.retries"),
        ({"timeout_seconds": 0.0}, "data.reading.timeout_seconds"),
        ({"max_skipped_share": 1.0}, "data.reading.max_skipped_share"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        plain("somewhere", reading=ReadingSettings(**wrong)).validate()


def test_what_may_be_left_out():
    settings = ReadingSettings(max_skipped=3, max_skipped_share=0.01)
    assert settings.allows(3, 3) and not settings.allows(4, 399) and settings.allows(4, 400)
    assert not ReadingSettings(max_skipped=0, max_skipped_share=0.0).allows(1, 10**6)
