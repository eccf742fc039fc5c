"""`lclm chat`: questions from a terminal or a pipe, one a line, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lclm.ask.answer import say, to_standard_output
from lclm.ask.chat import Chat
from lclm.ask.documents import Document, find_documents, printable
from lclm.ask.reader import Reader, Sampling

HELP = """\
/help              these lines
/documents         the documents, and what was made of them
/add FILE          read another file, folder, glob or .lclm, before the next question
/reset             forget the questions and answers; the documents stay
/save FILE.lclm    write the documents as one artifact, to be read again without compressing
/quit              end, as Ctrl-D does; Ctrl-C stops an answer
//...              a question that begins with a slash"""
_PROMPT = "> "


def talk(
    checkpoint: str,
    documents: Sequence[Document],
    *,
    sampling: Sampling,
    system: str | None = None,
    ratio: int | None = None,
    seed: int = 0,
) -> None:
    """A chat until its input ends. Answers go to standard output, all else to standard error.

    At a terminal an error is shown and the chat goes on, and Ctrl-C stops the answer only; from a pipe they
    end it, as ValueError, OSError or KeyboardInterrupt.
    """
    reader = Reader(checkpoint)
    chat = Chat(reader, sampling, say, system=system, ratio=ratio, seed=seed)
    chat.add(documents)
    reader.model()
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if not respond(chat, line.strip()):
                return
        return
    show = Console(stderr=True)
    show.print(Text(f"{checkpoint}: ask, or /help; Ctrl-D ends", "dim"))
    while (line := _next_line(show)) is not None:
        try:
            if not respond(chat, line.strip()):
                return
        except KeyboardInterrupt:
            show.print(Text("stopped", "dim"))
        except (ValueError, OSError) as error:
            for text in str(error).splitlines():
                show.print(Text(printable(text), "red"))


def respond(chat: Chat, line: str) -> bool:
    """Answer a question or obey a command; whether the chat goes on."""
    if not line:
        return True
    if not line.startswith("/") or line.startswith("//"):
        answer = chat.ask(line.removeprefix("/"), to_standard_output())
        say(answer.figures.line())
        if answer.stopped:
            raise KeyboardInterrupt
        return True
    command, _, argument = line[1:].partition(" ")
    if command in ("quit", "exit"):
        return False
    if command not in _COMMANDS:
        raise ValueError(f"/{command} is no command; /help lists them, //{command} asks it as a question")
    _COMMANDS[command](chat, argument.strip())
    return True


def _help(chat: Chat, argument: str) -> None:
    say(HELP)


def _documents(chat: Chat, argument: str) -> None:
    memories = [memory for artifact in chat.artifacts for memory in artifact.memories]
    for memory in memories:
        licence = f", {printable(memory.licence)}" if memory.licence else ""
        say(
            f"{printable(memory.name)}: {memory.tokens:,} tokens as {memory.latents:,} latents "
            f"({memory.ratio}x){licence}"
        )
    if not memories:
        say("no documents; /add FILE adds one")


def _add(chat: Chat, argument: str) -> None:
    if argument in ("", "-"):
        raise ValueError("/add needs a file, folder or glob, as in /add report.txt")
    chat.add(find_documents([os.path.expanduser(argument)], say))


def _reset(chat: Chat, argument: str) -> None:
    chat.reset()
    say("forgotten; the documents stay")


def _save(chat: Chat, argument: str) -> None:
    path = Path(os.path.expanduser(argument))
    chat.save(path)
    say(f"written: {printable(path)}, {path.stat().st_size:,} bytes")


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": _help,
    "documents": _documents,
    "add": _add,
    "reset": _reset,
    "save": _save,
}


def _next_line(show: Console) -> str | None:
    """A line from the terminal, with editing and history where readline is; None at the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    try:
        if sys.stdout.isatty():
            return input(f"\001\033[1m\002{_PROMPT}\001\033[0m\002")
        show.print(_PROMPT, end="", style="bold")
        return sys.stdin.readline() or None
    except (EOFError, KeyboardInterrupt):
        say("")
        return None
