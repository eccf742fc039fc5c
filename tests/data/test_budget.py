from __future__ import annotations

from dataclasses import replace

import pytest

from lclm.data.budget import budget, measure, propose
from lclm.data.inspect import describe, examples, inspect
from lclm.data.settings import PackSettings
from tests.data import material
from tests.data.test_batch import data_settings


def reading() -> dict:
    tokenizer = material.span_tokenizer("bytes")
    return {"tokenizer": tokenizer, "geometry": material.geometry(tokenizer, ratio=4, window=64)}


@pytest.fixture
def settings(stdlib, needles):
    return data_settings(stdlib, needles, pack=PackSettings(512, 3, 200))


def test_a_proposal_fills_both_budgets(settings):
    recipe, best, *_ = propose(settings, **reading(), ratios=[4, 8])
    assert recipe.pack == settings.pack
    assert best.good and best.pack.positions == 512 and best.pack.rows > 3
    assert best.latents <= best.pack.latents
    assert sum(best.shares.values()) == pytest.approx(1.0)


def test_the_table_shows_recipe_and_proposals_once_per_kind_of_stage(settings):
    only = replace(settings, mixture={"plain": 1.0})
    table = budget(settings, **reading(), stages={"a": only, "b": only})
    assert table.startswith("a, b:") and table.count("recipe") == 1
    assert "pack: {positions: 512, rows: 1" in table


def test_too_little_data_says_so(tmp_path, needles):
    documents = material.write_documents(tmp_path / "few", ["short"])
    settings = data_settings(documents, needles, mixture={"plain": 1.0}, epochs=1)
    with pytest.raises(ValueError, match="too few packs"):
        measure(settings, **reading())


def test_examples_are_shown_as_the_model_reads_them(settings):
    shown = [text.plain for text in inspect(settings, **reading(), samples=2)]
    assert len(shown) == 6
    assert all("decoder positions" in text and "with loss" in text for text in shown)
    chat = next(text for text in shown if text.startswith("chat"))
    assert "[memory: " in chat and " slots, 4x]" in chat and "<|assistant|>" in chat
    assert {text.split()[0] for text in shown} == {"interleave", "plain", "chat"}


def test_one_task_and_an_unknown_one(settings):
    (example,) = examples(settings, **reading(), task="plain")
    assert example.task == "plain"
    read = reading()
    assert describe(example, read["tokenizer"], read["geometry"]).plain.startswith("plain  d")
    with pytest.raises(ValueError, match="names 'plane'"):
        list(examples(settings, **reading(), task="plane"))
