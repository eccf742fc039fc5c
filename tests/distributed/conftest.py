"""Data shared by the distributed tests."""

import pytest

from tests.end_to_end import small_run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return small_run.build_data(tmp_path_factory.mktemp("corpus"))
