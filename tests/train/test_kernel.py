"""The attention kernel of a run is settled when it begins, and stays."""

from __future__ import annotations

import pytest

from lclm.model import attention
from lclm.recipe import Recipe, load_recipe
from lclm.train.processes import start_processes
from lclm.train.runs import open_run
from tests.end_to_end.small_run import build_data, recipe, write


def test_auto_is_settled_once_said_and_kept(tmp_path, monkeypatch, capsys):
    asked = load_recipe(write(tmp_path, recipe(build_data(tmp_path / "data"), tmp_path / "run")))
    processes = start_processes(asked.engine)
    present = {"varlen"}
    monkeypatch.setattr(attention, "missing", lambda name: None if name in present else "absent")
    asked.engine.precision = "bf16"
    run = open_run(asked, processes, lambda fitted: fitted)
    run.lock.close()
    assert "auto is varlen here" in capsys.readouterr().out
    assert Recipe.read(run.folder.requested).model.attention == "auto"
    assert Recipe.read(run.folder.recipe).model.attention == "varlen"
    present.clear()  # another machine
    again = open_run(asked, processes, lambda fitted: fitted)
    again.lock.close()
    assert again.recipe.model.attention == "varlen"
    with pytest.raises(ValueError, match="cannot be used"):
        attention.require(again.recipe.model.attention)
