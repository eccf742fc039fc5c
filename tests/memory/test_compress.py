"""`lclm compress`: documents to a file, again when they changed, and everything that it will not do."""

from pathlib import Path

import pytest

from lclm.cli import main
from lclm.model.artifact import Artifact

FIXTURES = Path(__file__).parents[1] / "conformance" / "fixtures"
FOX = "The quick brown fox jumps over the lazy dog.\n"


@pytest.fixture
def lclm(tmp_path, monkeypatch, capsys):
    """Runs `lclm compress ARGUMENTS --model ...` in a folder of its own; returns what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model="mean-4x", code=0):
        with pytest.raises(SystemExit) as stopped:
            main(["compress", *arguments, "--model", str(FIXTURES / model)])
        shown = capsys.readouterr()
        assert stopped.value.code == code and "Traceback" not in shown.err, shown.err
        assert shown.out == ""
        return " ".join(shown.err.replace("│", " ").split())

    return run


def test_documents_in_order_and_what_the_header_says(lclm):
    Path("notes").mkdir()
    Path("notes/b.md").write_text("# b\n" * 9)
    Path("notes/a.md").write_text("# a\n" * 9)
    Path("notes/logo.png").write_bytes(b"\x89PNG\0")
    Path("fox.txt").write_text(FOX * 9)
    said = lclm("fox.txt", "notes", "-o", "all.lclm", "--licence", "MIT", "--ratio", "8")
    assert "all.lclm: 3 memories, 324 tokens as 42 latents (7.7x)" in said and "logo.png" in said
    artifact = Artifact.load("all.lclm")
    assert [memory.name for memory in artifact.memories] == ["fox.txt", "notes/a.md", "notes/b.md"]
    assert {(memory.licence, memory.ratio) for memory in artifact.memories} == {("MIT", 8)}
    lclm("notes/a.md", "all.lclm", "fox.txt", "-o", "more.lclm")
    names = [memory.name for memory in Artifact.load("more.lclm").memories]
    assert names == ["notes/a.md", "fox.txt", "notes/a.md", "notes/b.md", "fox.txt"]
    lclm("all.lclm", "more.lclm", "-o", "joined.lclm")
    assert len(Artifact.load("joined.lclm")) == 8


def test_again_encodes_what_changed(lclm):
    fox = Path("fox.txt")
    fox.write_text(FOX * 60)
    assert "known" not in lclm("fox.txt", "-o", "fox.lclm")
    first = Path("fox.lclm").read_bytes()
    windows = len(Artifact.load("fox.lclm").windows)
    assert f"{windows} of {windows} windows were known" in lclm("fox.txt", "-o", "fox.lclm")
    assert Path("fox.lclm").read_bytes() == first
    fox.write_text(FOX * 60 + "The end.")
    assert f"; {windows - 1} of {windows} windows were known" in lclm("fox.txt", "-o", "fox.lclm")
    assert "known" not in lclm("fox.txt", "-o", "fox.lclm", "--fresh")
    assert sorted(path.name for path in Path().iterdir()) == ["fox.lclm", "fox.txt"]


def test_what_it_refuses_before_work(lclm, monkeypatch):
    Path("fox.txt").write_text(FOX)
    Path("folder.lclm").mkdir()
    lclm("fox.txt", "-o", "fox.lclm")
    with monkeypatch.context() as nothing_loads:
        nothing_loads.setattr("lclm.ask.reader.Reader.model", None)
        for arguments, message in (
            (("fox.txt", "-o", "fox.txt"), "ends in .lclm; call it fox.lclm"),
            (("fox.txt", "-o", "none/fox.lclm"), "there is no folder none"),
            (("fox.txt", "-o", "folder.lclm"), "is a folder"),
            (("fox.txt", "fox.lclm", "-o", "fox.lclm"), "both read and written"),
            ((".", "-o", "fox.lclm"), "both read and written"),
            (("none.txt", "-o", "none.lclm"), "no such file"),
        ):
            assert message in lclm(*arguments, code=2)
    assert "have no effect" in lclm("fox.lclm", "-o", "copy.lclm", "--ratio", "8", code=2)
    assert "ratio 5 does not divide" in lclm("fox.txt", "-o", "copy.lclm", "--ratio", "5", code=2)
    assert not Path("copy.lclm").exists() and Path("fox.txt").read_text() == FOX


def test_an_output_that_is_there_is_kept_unless_fresh(lclm):
    Path("fox.txt").write_text(FOX)
    lclm("fox.txt", "-o", "fox.lclm")
    before = Path("fox.lclm").read_bytes()
    said = lclm("fox.txt", "-o", "fox.lclm", model="mean-8x-overlap8", code=2)
    assert "made with another encoder" in said and "--fresh" in said
    assert "another encoder" in lclm("fox.lclm", "-o", "x.lclm", model="mean-8x-overlap8", code=2)
    assert Path("fox.lclm").read_bytes() == before
    Path("fox.lclm").write_bytes(before[:-1] + b"\xff")
    said = lclm("fox.txt", "-o", "fox.lclm", code=2)
    assert "fox.lclm is damaged" in said and "--fresh" in said
    lclm("fox.txt", "-o", "fox.lclm", "--fresh")
    assert Path("fox.lclm").read_bytes() == before
