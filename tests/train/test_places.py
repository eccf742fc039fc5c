"""The judgement over the processes of a run: who is named for what, without any process."""

from __future__ import annotations

import math

import pytest

from lclm.train.ends import LOST, REQUEUE, WRONG, Lost, Requeue
from lclm.train.places import Limits, Place, Seen, Verdict, blocking, judge, listed

LIMITS = Limits(silent=30, failed=4, still=100, alone=1000)


def seen(*places, heard=0.0, moved=0.0):
    return {rank: Seen(place, heard, moved) for rank, place in enumerate(places)}


def place(rank=0, **what):
    return Place(**{"host": f"node{rank // 2}", "phase": "forward", "step": 1234, "marks": 50} | what)


def test_all_is_well():
    assert judge(seen(place(), place(1)), 20.0, LIMITS) is None


def test_one_that_gives_no_sign_of_life_is_named_with_host_step_and_phase():
    known = seen(place(0), place(1), place(2), place(3), heard=90, moved=90)
    known[2].heard = 10
    verdict = judge(known, 95.0, LIMITS)
    assert verdict.code == LOST
    assert verdict.text.startswith("process 2 (node1) does not answer: no sign of life for 85 s")
    assert "step 1,234, forward" in verdict.text
    assert "processes 0, 1 (node0) and process 3 (node1): step 1,234, forward" in verdict.text


def test_a_failed_process_makes_the_others_impatient():
    known = seen(place(0, failed="RuntimeError: Connection reset"), place(1), heard=10, moved=10)
    known[1].heard = 4
    assert judge(known, 7.9, LIMITS) is None
    assert "process 1 (node0) does not answer" in judge(known, 8.1, LIMITS).text


def test_one_that_is_behind_is_named_and_not_those_that_wait_for_it():
    known = seen(
        place(0, phase="tally", marks=51, waiting=True),
        place(1, phase="data", marks=50, line="stream.py:80 read"),
        place(2, phase="tally", marks=51, waiting=True),
        heard=120,
    )
    verdict = judge(known, 121.0, LIMITS)
    assert verdict.text.startswith(
        "process 1 (node0) does not go on: 121 s at step 1,234, data, in stream.py:80 read"
    )


def test_in_one_phase_those_that_do_not_wait_for_others_are_to_blame():
    places = {0: place(waiting=True), 1: place(1), 2: place(2, waiting=True)}
    assert blocking(places) == [1]
    assert blocking({rank: place(rank, waiting=True) for rank in range(3)}) == [0, 1, 2]


def test_the_main_process_may_work_alone_for_long():
    known = seen(place(0, long=True), place(1, long=True), heard=500)
    assert judge(known, 501.0, LIMITS) is None
    known[0].heard = known[1].heard = 1000
    assert "not go on" in judge(known, 1001.0, LIMITS).text


@pytest.mark.parametrize(
    ("code", "becomes", "kind"), [(WRONG, WRONG, ValueError), (REQUEUE, REQUEUE, Requeue), (1, LOST, Lost)]
)
def test_the_end_of_one_is_the_end_of_all(code, becomes, kind):
    verdict = judge(seen(place(), place(1, end=[code, "full disk"])), 1.0, LIMITS)
    assert verdict.code == becomes and "full disk" in verdict.text
    assert isinstance(verdict.error(), kind)


def test_those_that_left_in_order_are_not_missed():
    assert judge(seen(place(), place(1, end=[0, ""])), 10.0, LIMITS) is None
    known = seen(place(), place(1, end=[0, ""]))
    known[0].heard = known[0].moved = 1e6
    assert judge(known, 1e6, LIMITS) is None


def test_a_process_that_was_stopped_itself_blames_nobody():
    known = seen(place(), place(1))
    for one in known.values():
        one.shift(5000)
    assert judge(known, 5010.0, LIMITS) is None


def test_a_place_travels_as_text_and_numbers_are_short():
    there = place(3, end=[REQUEUE, "a\nb"], line="x.py:3 f")
    assert Place.unpack(there.pack()) == there
    assert listed([7, 0, 1, 2, 5]) == "0-2, 5, 7"
    assert judge(seen(place()), math.inf, Limits(*[math.inf] * 4)) is None
    assert isinstance(Verdict(LOST, "").error(), Lost)
