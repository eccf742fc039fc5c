from __future__ import annotations

import numpy as np
import pytest

from lclm.eval.statistics import Bootstrap


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        interval = Bootstrap(60, seed).mean(rng.normal(0.3, 1.0, 60))
        covered += interval["low"] <= 0.3 <= interval["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_differences_are_tighter_than_the_means():
    rng = np.random.default_rng(1)
    none = rng.normal(1.3, 0.5, 80)
    compressed = none - 0.1 + rng.normal(0, 0.02, 80)
    interval = Bootstrap(80, 0)
    assert interval.mean(none - compressed)["low"] > 0.09
    assert interval.mean(compressed)["high"] > interval.mean(none)["low"]


def test_share_is_the_ratio_of_means_and_needs_something_to_share():
    rng = np.random.default_rng(2)
    whole = rng.normal(0.2, 0.05, 50)
    found = Bootstrap(50, 0).share(whole / 2, whole)
    assert found["mean"] == pytest.approx(0.5) and found["low"] == pytest.approx(0.5)
    nothing = Bootstrap(50, 0).share(whole, rng.normal(0, 0.1, 50))
    assert nothing == {"mean": None, "low": None, "high": None}


def test_proportions_at_their_ends_keep_some_width():
    interval = Bootstrap(64, 0)
    low = interval.proportion(np.zeros(64))
    high = interval.proportion(np.ones(64))
    assert low["mean"] == low["low"] == 0 and 0.03 < low["high"] < 0.08
    assert high["mean"] == 1 and high["high"] == pytest.approx(1) and 0.92 < high["low"] < 0.97
    mixed = interval.proportion(np.linspace(0.8, 1.0, 64))
    assert mixed["low"] < 0.9 < mixed["high"]


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).normal(size=30)
    assert Bootstrap(30, 7).mean(values) == Bootstrap(30, 7).mean(values)


def test_samples_of_one_document_count_as_one_draw():
    rng = np.random.default_rng(4)
    values = np.repeat(rng.normal(size=12), 20)
    alone = Bootstrap(240, 0).mean(values)
    grouped = Bootstrap(240, 0, np.repeat(np.arange(12), 20)).mean(values)
    assert grouped["mean"] == alone["mean"]
    assert grouped["high"] - grouped["low"] > 3 * (alone["high"] - alone["low"])
    assert Bootstrap(5, 0, [7] * 5).mean(np.arange(5.0)) == {"mean": 2.0, "low": None, "high": None}


def test_one_sample_has_no_interval_and_none_is_an_error():
    assert Bootstrap(1, 0).mean(np.array([2.0])) == {"mean": 2.0, "low": None, "high": None}
    with pytest.raises(ValueError, match="at least one sample"):
        Bootstrap(0, 0)
    with pytest.raises(ValueError, match="one per sample"):
        Bootstrap(3, 0).mean(np.zeros(4))
