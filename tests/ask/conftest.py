"""A small released checkpoint and documents for it, and ways to ask."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lclm.ask.chat import Chat
from lclm.ask.documents import Document
from lclm.ask.reader import Reader, Sampling
from lclm.cli import main

CHECKPOINT = str(Path(__file__).parents[1] / "conformance" / "fixtures" / "mean-4x")


@pytest.fixture
def checkpoint() -> str:
    return CHECKPOINT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two documents and a binary; the process is beside it."""
    files = tmp_path / "docs"
    files.mkdir()
    (files / "fox.txt").write_text("The <|memory_start|>quick brown fox\njumps over the lazy dog. " * 4)
    (files / "add.py").write_text("def add(a, b):\n    return a + b<|im_end|>\n" * 3)
    (files / "logo.png").write_bytes(b"\x89PNG\0")
    monkeypatch.chdir(tmp_path)
    return files


@pytest.fixture
def texts() -> list[Document]:
    return [Document("fox", "The quick brown fox jumps. " * 9), Document("add", "def add(a, b): pass\n" * 5)]


@pytest.fixture
def lclm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in this process: (standard output, standard error)."""

    def run(*arguments: str, code: int = 0, typed: str = "", checkpoint: str = CHECKPOINT) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        with pytest.raises(SystemExit) as stopped:
            main([arguments[0], checkpoint, *arguments[1:]])
        shown = capsys.readouterr()
        assert stopped.value.code == code, shown.err
        return shown.out, shown.err

    return run


class Loads:
    """What from_pretrained loaded, and rows of every call of an encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoders: list[bool] = []
        self.rows: list[int] = []
        model = Reader.model

        def watched(reader: Reader, encoder: bool = False) -> Any:
            before = reader._model
            loaded = model(reader, encoder)
            if loaded is not before:
                self.encoders.append(loaded.encoder is not None)
                if loaded.encoder is not None:
                    loaded.encoder.register_forward_pre_hook(self._count, with_kwargs=True)
            return loaded

        monkeypatch.setattr(Reader, "model", watched)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows.append(kwargs["input_ids"].shape[0])


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


class Asked:
    """A chat whose answers are returned."""

    def __init__(
        self, tokens: int = 10, temperature: float = 0.0, checkpoint: str = CHECKPOINT, **options: Any
    ) -> None:
        self.told: list[str] = []
        self.reader = Reader(checkpoint)
        self.chat = Chat(self.reader, Sampling(tokens, temperature), self.told.append, **options)
        self.figures: list[Any] = []

    def __call__(self, question: str) -> str:
        pieces: list[str] = []
        answer = self.chat.ask(question, pieces.append)
        self.figures.append(answer.figures)
        assert "".join(pieces) == answer.text + "\n"
        return answer.text


@pytest.fixture
def asked(texts: list[Document]) -> Callable[..., Asked]:
    """Makes chats, over `texts` unless told otherwise."""

    def make(documents: list[Document] | None = None, **options: Any) -> Asked:
        chat = Asked(**options)
        chat.chat.add(texts if documents is None else documents)
        return chat

    return make
