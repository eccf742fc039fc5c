"""Data shared by the distributed tests."""

import pytest

from tests.distributed.tiny import tiny
from tests.end_to_end import small_run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return small_run.build_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def one(data, tmp_path_factory):
    """The tiny recipe's run (see tiny.py) as one process makes it."""
    run = tmp_path_factory.mktemp("one") / "run"
    small_run.run(tiny(data, run, 0))
    return run
