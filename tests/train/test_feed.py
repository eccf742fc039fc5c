"""What the data of one process ends with is raised by all, as what it is."""

from __future__ import annotations

import pytest

from lclm.data.batch import Step
from lclm.train.ends import Lost
from lclm.train.feed import Tally
from lclm.train.processes import start_processes
from lclm.train.settings import EngineSettings


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (ValueError("shard-00001.tar is missing"), ValueError, "^shard-00001.tar is missing$"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal"),
            Lost,
            "process 0: a background process",
        ),
        (KeyError("spans"), RuntimeError, "process 0: its data loader failed: KeyError"),
    ],
)
def test_a_failure_of_the_data_is_raised_with_the_tally(failure, kind, message):
    processes = start_processes(EngineSettings())
    with pytest.raises(kind, match=message) as raised:
        Tally(Step([], failure=failure, names=["plain"]), processes)
    assert raised.value.__cause__ is failure
