"""Which process is named as slow, from what each measured; no process is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lclm.train.slow import LINES, Slowness


class Others:
    """The processes seen from the first one; `rows` is what the others measured."""

    def __init__(self, size):
        self.size, self.rank, self.device, self.rows = size, 0, torch.device("cpu"), []

    def gather(self, value):
        return [f"node{rank}" for rank in range(self.size)]

    def sum(self, table):
        table[1:] = torch.tensor(self.rows, dtype=table.dtype)
        return table


def clock(data=0.01, forward=0.2, longest=None):
    return SimpleNamespace(
        spent={"data": 2 * data, "forward": 2 * forward, "update": 0.1},
        steps=2,
        seconds_of_steps=[0.5, 0.5],
        longest=longest or {"seconds": 0.5, "step": 0, "data": data, "forward": forward},
    )


def row(data=0.01, forward=0.2, longest_data=None, longest_forward=None):
    return [data, forward, 0.05, longest_data or data, longest_forward or forward]


@pytest.mark.parametrize("size", [2, 3, 64])
@pytest.mark.parametrize("part", ["data", "forward"])
def test_the_slow_one_is_named_once_after_some_lines(size, part):
    processes = Others(size)
    slowness = Slowness(processes, zero=2)
    processes.rows = [row() for _ in range(size - 2)] + [row(**{part: 0.4})]
    found = [slowness.look(clock(), 2 * (line + 1)).found for line in range(LINES + 2)]
    assert [len(each) for each in found] == [0] * (LINES - 1) + [1, 0, 0]
    (slow,) = found[LINES - 1]
    last = size - 1
    assert (
        slow.event["process"] == last and slow.event["host"] == f"node{last}" and slow.event["part"] == part
    )
    assert f"process {last} (node{last}) is slow: 0.4 s a step" in slow.text


def test_equal_processes_and_small_differences_are_not_named():
    processes = Others(4)
    slowness = Slowness(processes, zero=1)
    processes.rows = [row(data=0.03), row(forward=0.22), row(forward=0.19)]
    looks = [slowness.look(clock(), 2 * (line + 1)) for line in range(6)]
    assert not any(look.found for look in looks)
    assert looks[0].spread["data"] == {"median": pytest.approx(0.01), "most": 0.03, "process": 1}


def test_one_long_step_is_named_with_who_held_it_up():
    processes = Others(2)
    slowness = Slowness(processes, zero=2)
    processes.rows = [row()]
    for line in range(1, 4):
        assert not slowness.look(clock(), 10 + 2 * line).found
    processes.rows = [row(longest_data=3.1)]
    longest = {"seconds": 3.5, "step": 1, "data": 0.01, "forward": 0.2}
    (found,) = slowness.look(clock(longest=longest), 20).found
    assert found.event["event"] == "slow_step" and found.event["of_step"] == 20
    assert found.event["process"] == 1 and found.event["part"] == "data"
