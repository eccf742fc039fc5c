from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.data.settings import SourceSettings
from lclm.data.stream import Source, SourceLane, permuted, seed_of
from tests.data import material


@given(size=st.integers(1, 400), key=st.integers(0, 2**128 - 1))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_depend_on_the_key_and_are_cheap_at_any_size():
    orders = {tuple(permuted(i, 50, seed_of("order", seed)) for i in range(50)) for seed in range(20)}
    assert len(orders) == 20
    assert 0 <= permuted(123, 10**12, 5) < 10**12
    with pytest.raises(ValueError, match="outside"):
        permuted(5, 5, 0)


def source(path: str, **settings) -> Source:
    return Source("documents", SourceSettings(path), seed=settings.pop("seed", 0), run_samples=4, **settings)


@pytest.mark.parametrize("lanes", [1, 3, 8, 40])
def test_every_sample_once_per_epoch_over_lanes(stdlib, lanes):
    whole = source(stdlib, epochs=2)
    seen = []
    for lane in range(lanes):
        stream = SourceLane(whole, lane, lanes)
        while (held := stream.pull()) is not None:
            seen.append((held.epoch, held.sample.key))
    keys = [sample.key for sample in whole.data]
    assert sorted(seen) == sorted((epoch, key) for epoch in (0, 1) for key in keys)


def test_a_lane_goes_on_from_its_two_numbers(stdlib):
    whole = source(stdlib)
    stream = SourceLane(whole, 1, 3)
    held = [stream.pull() for _ in range(30)]
    for stop in (0, 3, 4, 17, 29):
        first = SourceLane(whole, 1, 3)
        for _ in range(stop):
            first.pull()
        again = SourceLane(whole, 1, 3, first.turn, first.index)
        assert [again.pull().sample.key for _ in range(30 - stop)] == [h.sample.key for h in held[stop:]]
    mixed = held[::-1][::2] + held[1:9]
    assert [h.sample.key for h in stream.fetch([h.place for h in mixed])] == [h.sample.key for h in mixed]


def test_epochs_and_seeds_have_their_own_order(stdlib):
    def order(whole: Source, epoch: int) -> list[object]:
        return [whole.run(epoch * whole.runs + i) for i in range(whole.runs)]

    def places(runs) -> list[tuple[int, int]]:
        return [(run.shard, run.start) for run in runs]

    first, other = source(stdlib), source(stdlib, seed=1)
    orders = [places(order(first, 0)), places(order(first, 1)), places(order(other, 0))]
    assert len({tuple(o) for o in orders}) == 3
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_draws_depend_on_the_example_alone(stdlib):
    whole = source(stdlib)
    assert whole.draws(0, 0, 3, 10).random() == source(stdlib).draws(0, 0, 3, 10).random()
    numbers = {
        whole.draws(*where).random() for where in [(0, 0, 3, 10), (1, 0, 3, 10), (0, 0, 3, 11), (0, 0, 4, 10)]
    }
    assert len(numbers) == 4


def test_errors_name_the_source(tmp_path):
    with pytest.raises(ValueError, match="data source 'documents'"):
        source(str(tmp_path / "missing"))
    empty = material.write_documents(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="no samples"):
        source(empty)
