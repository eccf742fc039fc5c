"""A Hub on loopback, for this process and those it starts; and a run to publish."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.material import make_run
from tests.hub.server import HubServer


def log_in(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    """Let this process's huggingface_hub, imported already, know the server and the token."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no such file")
    monkeypatch.setenv("HF_TOKEN", server.token)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, with this process logged in to it."""
    server = HubServer()
    log_in(monkeypatch, server)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def one_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; the whole report is drawn where the command runs in its own."""
    import lclm.hub.publish

    monkeypatch.setattr(lclm.hub.publish, "PLOTS", ("validation",))


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for, none of which is taken."""
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    return taken


@pytest.fixture(scope="session")
def published_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two complete stages, its weights in several files; not to be changed."""
    return make_run(tmp_path_factory.mktemp("published") / "run", max_shard_size="300KB")


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """For a fresh process with an empty cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HOME": str(home)}
    return {**kept, **own, "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
