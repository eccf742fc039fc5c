from __future__ import annotations

import pytest

from tests.data import material


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory) -> str:
    return material.write_documents(tmp_path_factory.mktemp("stdlib"), material.stdlib_texts(60))


@pytest.fixture(scope="session")
def needles(tmp_path_factory) -> str:
    items = material.conversations(400, mean=2.6, spread=0.4)
    return material.write_conversations(tmp_path_factory.mktemp("needles"), items)


@pytest.fixture(scope="session")
def web(tmp_path_factory) -> str:
    return material.write_documents(tmp_path_factory.mktemp("web"), material.web_documents(400))


@pytest.fixture(scope="session")
def long_conversations(tmp_path_factory) -> str:
    items = material.conversations(200, mean=7.0, spread=0.9)
    return material.write_conversations(tmp_path_factory.mktemp("long"), items)
