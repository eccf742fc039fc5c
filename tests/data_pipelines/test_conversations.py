"""Conversations: every answer can be found in the piece of real text that its question is about."""

from __future__ import annotations

import inspect
import json
import random
import re

import pytest

from data_pipelines.conversations import functions, make_conversations
from data_pipelines.settings import ConversationSettings
from lclm.data.shards import check_messages

SOURCE = inspect.getsource(json.decoder) + inspect.getsource(re)
KEYS = ["apple", "river", "stone", "cloud", "tiger"]


def made(seed: int = 0, text: str = SOURCE, **options: object) -> list:
    settings = ConversationSettings(**options)
    return list(make_conversations(text, settings, random.Random(seed), functions(text)))


def parts(messages: list) -> tuple[str, list[tuple[str, str]]]:
    """The context, and pairs of question and answer."""
    check_messages(messages)
    context, question = (part["text"] for part in messages[0]["content"])
    texts = [question, *(message["content"] for message in messages[1:])]
    return context, list(zip(texts[::2], texts[1::2], strict=True))


def test_one_needle() -> None:
    found = made(keys=KEYS, context=[64, 128], per_document=50, per_kilobyte=10)
    assert len(found) == 50
    for messages, _ in found:
        context, [(question, answer)] = parts(messages)
        assert messages[0]["content"][0]["type"] == "memory"
        key = re.fullmatch(r"What is the magic number for (\w+)\?", question)[1]
        assert len(answer) == 5 and answer.isdigit()
        assert context.count(f"\nThe magic number for {key} is {answer}.\n") == 1
        assert 60 <= len(context) <= 128


@pytest.mark.parametrize("ask", ["one", "all"])
def test_several_needles(ask: str) -> None:
    found = made(keys=KEYS, context=[200, 200], needles=[2, 4], ask=ask, per_document=40, per_kilobyte=10)
    counts = set()
    for messages, meta in found:
        context, pairs = parts(messages)
        facts = dict(re.findall(r"The magic number for (\w+) is (\d{5})\.\n", context))
        assert len(facts) == meta["needles"]
        assert len(pairs) == (1 if ask == "one" else len(facts))
        for question, answer in pairs:
            assert facts[question.split()[-1].rstrip("?")] == answer
        counts.add(len(facts))
    assert counts == {2, 3, 4}


def test_needles_keep_the_text_around_them() -> None:
    text = "".join(f"line {i}\n" for i in range(200))
    for messages, meta in made(text=text, keys=KEYS, context=[90, 120], per_document=20, per_kilobyte=20):
        context, _ = parts(messages)
        rest = re.sub(r"\nThe magic number for \w+ is \d+\.\n", "\n", context)
        assert text[meta["start"] :].startswith(rest)


def test_docstrings() -> None:
    found = made(kind="docstring", context=[200, 400], per_document=30, per_kilobyte=10)
    assert len(found) >= 5
    for messages, meta in found:
        context, [(question, answer)] = parts(messages)
        assert question == f"What does the docstring of {meta['function']} say?"
        assert f"def {meta['function']}(" in context
        assert answer in " ".join(context.split())
        assert context in SOURCE and len(context) <= 400


def test_parameters() -> None:
    found = made(kind="parameters", context=[100, 300], per_document=30, per_kilobyte=10)
    assert len(found) >= 5
    answers = {meta["function"]: parts(messages)[1][0][1] for messages, meta in found}
    assert answers["raw_decode"] == "self, s, idx"
    for messages, meta in found:
        context, [(_, answer)] = parts(messages)
        definition = context[context.index(f"def {meta['function']}(") :]
        assert all(name.strip("*") in definition for name in answer.split(", "))


def test_next_lines() -> None:
    found = made(kind="next_line", context=[100, 200], per_document=30, per_kilobyte=10)
    assert len(found) == 30
    for messages, _ in found:
        context, [(question, answer)] = parts(messages)
        line = question.partition("\n")[2]
        assert context.count(f"{line}\n{answer}\n") == 1


def test_the_same_seed_gives_the_same() -> None:
    for kind in ("needles", "next_line", "docstring"):
        keys = {"keys": KEYS} if kind == "needles" else {}
        assert made(1, kind=kind, **keys) == made(1, kind=kind, **keys)
        assert made(1, kind=kind, **keys) != made(2, kind=kind, **keys)


def test_some_uncompressed() -> None:
    found = made(keys=KEYS, uncompressed=0.5, per_document=60, per_kilobyte=10)
    kinds = [messages[0]["content"][0]["type"] for messages, _ in found]
    assert 10 < kinds.count("text") < 50


@pytest.mark.parametrize("text", ["", "x", "def broken(:\n", "\x00", "é日本\n" * 3])
def test_odd_documents_give_none_or_valid_ones(text: str) -> None:
    for kind in ("needles", "docstring", "parameters", "next_line"):
        for messages, _ in made(text=text, kind=kind, **({"keys": KEYS} if kind == "needles" else {})):
            parts(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "needle"}, "did you mean 'needles'"),
        ({"keys": []}, "different keys"),
        ({"keys": KEYS, "context": [20, 30]}, "do not fit"),
        ({"keys": KEYS, "context": [30]}, "least, most"),
        ({"keys": KEYS, "needle": "no value"}, "must hold"),
        ({"keys": KEYS, "ask": "some"}, "one or all"),
        ({"kind": "docstring", "keys": KEYS}, "no effect"),
        ({"keys": KEYS, "uncompressed": 2}, "share"),
    ],
)
def test_settings_without_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConversationSettings(**options)
