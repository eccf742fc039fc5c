"""What becomes a document, what is left out, and what is an error."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest

from lclm.ask import documents
from lclm.ask.documents import find_documents, printable


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of all kinds of files, which is also where the process is."""
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / ".git").mkdir()
    for name, content in {
        "b.txt": "häuser".encode(),
        "a.md": b"\xef\xbb\xbfwith a mark",
        "deep/c.txt": b"one\r\ntwo",
        "deep/saved.lclm": b"anything",
        "logo.png": b"\x89PNG\0\0",
        "latin.txt": b"h\xe4user",
        "wide.txt": "wide".encode("utf-16"),
        "empty.txt": b" \n",
        ".env": b"secret",
        ".git/config": b"text",
    }.items():
        (tmp_path / "docs" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "docs"


def test_folders_hold_text_and_artifacts_and_the_rest_is_named(folder: Path) -> None:
    told: list[str] = []
    found = find_documents(["docs"], told.append)
    assert [d.name for d in found] == ["docs/a.md", "docs/b.txt", "docs/deep/c.txt", "docs/deep/saved.lclm"]
    assert [d.text for d in found] == ["with a mark", "häuser", "one\r\ntwo", None]
    assert found[3].artifact == Path("docs/deep/saved.lclm") and found[0].artifact is None
    (line,) = told
    for part in (
        "2 hidden (docs/.env, docs/.git)",
        "1 binary (docs/logo.png)",
        "1 empty (docs/empty.txt)",
        "1 not UTF-8 text (docs/latin.txt)",
        "1 not UTF-8 but UTF-16 (docs/wide.txt)",
    ):
        assert part in line


def test_globs_order_and_duplicates(folder: Path) -> None:
    told: list[str] = []
    names = [d.name for d in find_documents(["docs/*.txt", "docs/deep/c.txt", "docs"], told.append)]
    assert names == ["docs/b.txt", "docs/deep/c.txt", "docs/a.md", "docs/deep/saved.lclm"]
    assert [d.name for d in find_documents(["docs/**/*.txt"])] == ["docs/b.txt", "docs/deep/c.txt"]
    os.link(folder / "b.txt", folder / "hard.txt")
    (folder / "soft.txt").symlink_to("b.txt")
    assert [d.name for d in find_documents(["docs/soft.txt", "docs/*.txt"])] == ["docs/soft.txt"]
    (folder / "[x].txt").write_text("a name that looks like a glob")
    assert [d.name for d in find_documents(["docs/[x].txt"])] == ["docs/[x].txt"]


def test_loops_of_links_end_and_special_files_do_not_block(folder: Path) -> None:
    (folder / "deep" / "up").symlink_to("..")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    told: list[str] = []
    assert len(find_documents(["docs"], told.append)) == 4
    assert "1 unreadable (docs/gone)" in told[0] and "1 no regular file (docs/pipe)" in told[0]


def test_standard_input_and_pipes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    os.mkfifo("named")
    writer = threading.Thread(target=lambda: Path("named").write_text("from another"))
    writer.start()
    found = find_documents(["-", "named", "-"])
    writer.join()
    assert [(d.name, d.text) for d in found] == [
        ("standard input", "from a pipe"),
        ("named", "from another"),
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.txt", "nowhere.txt: there is no such file or folder"),
        ("docs/*.pdf", "no file matches"),
        ("docs/logo.png", "docs/logo.png: binary; give its text"),
        ("docs/latin.txt", "docs/latin.txt: not UTF-8 text; see byte 1"),
        ("docs/wide.txt", "iconv -f UTF-16"),
        ("docs/empty.txt", "docs/empty.txt: empty"),
        ("docs/*.png", r"holds no document that can be read: left out 1 binary \(docs/logo.png\)"),
        ("docs/.git", None),
    ],
)
def test_what_is_named_must_be_usable(folder: Path, path: str, message: str | None) -> None:
    if message is None:
        assert [d.name for d in find_documents([path])] == ["docs/.git/config"]
        return
    with pytest.raises((ValueError, OSError), match=message):
        find_documents(["docs", path])


def test_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 12)
    told: list[str] = []
    (folder / "long.txt").write_text("0123456789abc")
    assert len(find_documents(["docs/*.txt"], told.append)) == 1 and "(docs/long.txt)" in told[0]
    with pytest.raises(ValueError, match=r"long.txt: over 0 MiB; cut it"):
        find_documents(["docs/long.txt"])
    monkeypatch.setattr(documents, "MOST_DOCUMENTS", 1)
    with pytest.raises(ValueError, match="docs: makes more than 1 documents"):
        find_documents(["docs"])


def test_hostile_names_are_shown_harmless(folder: Path) -> None:
    hostile = [b"\x1b[2Jclear", b"new\nline", b"not\xffutf8", "\u202eright".encode(), b"[red]<|memory|>"]
    (folder / "names").mkdir()
    for name in hostile:
        Path(os.fsdecode(bytes(folder) + b"/names/" + name)).write_text("text")
    names = [document.name for document in find_documents(["docs/names"])]
    assert all(name.isprintable() and name.encode() for name in names) and len(names) == len(hostile)
    assert printable("\x1b[2Jclear") == "\\x1b[2Jclear" and "docs/names/not\\xffutf8" in names
