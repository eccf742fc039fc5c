"""Sources and filters: what is found, what is left out, and the shipped pipeline recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from datatrove.data import Document

from data_pipelines.conversations import functions
from data_pipelines.plan import make_plan
from data_pipelines.settings import FilterSettings, SourceSettings
from data_pipelines.sources import find_inputs, make_reader, plain
from data_pipelines.steps import PlainWords, key_of, make_filter
from lclm.settings import shipped_recipes


def test_stdlib_files() -> None:
    found = find_inputs("stdlib", SourceSettings(kind="stdlib", exclude=["test/*"], max_file_bytes=100_000))
    assert "argparse.py" in found.files and "asyncio/events.py" in found.files
    assert not [
        file for file in found.files if file.startswith(("site-packages", "test/")) or "__pycache__" in file
    ]
    assert found.dropped["excluded files"] > 10  # systems leave most of the tests out
    assert found == find_inputs(
        "stdlib", SourceSettings(kind="stdlib", exclude=["test/*"], max_file_bytes=100_000)
    )


def test_stdlib_documents_are_python(tmp_path: Path) -> None:
    source = SourceSettings(kind="stdlib", include=["json/*.py", "test/encoded_modules/*.py"])
    inputs = find_inputs("stdlib", source)
    (tmp_path / "list").write_text("\n".join(inputs.files))
    reader = make_reader("stdlib", source, inputs, str(tmp_path / "list"))
    documents = list(reader())
    assert {document.metadata["path"] for document in documents} >= {"json/decoder.py", "json/encoder.py"}
    assert "py_scanstring" in [f.name for d in documents for f in functions(d.text)]


def test_patterns_and_limits(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "deep/c.txt", "deep/d.md", "large.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * (1000 if name == "large.txt" else 10))
    source = SourceSettings(path=str(tmp_path), include=["*.txt"], exclude=["b*"], max_file_bytes=100)
    found = find_inputs("s", source)
    assert found.files == ["a.txt", "deep/c.txt"]
    assert found.dropped == {"excluded files": 1, "files over max_file_bytes": 1}
    assert len(find_inputs("s", SourceSettings(path=str(tmp_path), max_files=2)).files) == 2
    assert find_inputs("s", SourceSettings(path=str(tmp_path / "deep/d.md"))).files == ["d.md"]
    with pytest.raises(ValueError, match="none of the 5 files"):
        find_inputs("s", SourceSettings(path=str(tmp_path), include=["*.pdf"]))


def test_keys_are_plain_and_unique() -> None:
    paths = ["a.b/c d.py", "a_b/c_d.py", "é日.txt", "x" * 300]
    keys = [key_of(Document("t", p, metadata={"source": "my source!", "path": p})) for p in paths]
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= 76 and "." not in key and key.isascii() for key in keys)


def test_what_json_cannot_hold() -> None:
    odd = {"a": float("nan"), 1: (1, {2}), "p": Path("x")}
    assert plain(odd) == {"a": None, "1": [1, "{2}"], "p": "x"}


@pytest.mark.parametrize("kind", ["gopher_quality", "gopher_repetition", "fineweb_quality", "sampler"])
def test_filters_of_datatrove(kind: str) -> None:
    options = {"rate": 0.5} if kind == "sampler" else {}
    made = make_filter("f", FilterSettings(kind=kind, options=options))
    words = "the quick fox and that lazy dog have been with us to see what it is of this place\n"
    kept = list(made(iter([Document("word " * 300, "a"), Document(words * 5, "b")]), 0, 1))
    assert len(kept) <= 2


def test_plain_words() -> None:
    words = PlainWords()
    assert words.word_tokenize("Ab_1, été!") == ["Ab_1", "été"]
    text = "One. Two!\nThree"
    assert [text[a:b] for a, b in words.span_tokenize(text)] == words.sent_tokenize(text)


@pytest.mark.parametrize("path", sorted(shipped_recipes().glob("data/*.yaml")), ids=lambda path: path.stem)
def test_shipped_pipeline_recipes(path: Path, tmp_path: Path) -> None:
    plan = make_plan(path, [f"out={tmp_path / 'out'}"])
    assert all(inputs.files for inputs in plan.inputs.values())
    assert plan.provenance["recipe"]["name"] == path.stem
