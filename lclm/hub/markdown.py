"""Text of any origin as Markdown that shows it, and does nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def plain(text: Any) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would take for its own."""
    escaped = re.sub(r"([\\`*_{}\[\]#|~!$])", r"\\\1", one_line(str(text)))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def one_line(text: str) -> str:
    """`text` without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def block(text: str) -> str:
    """A code block by indentation, which no content can end."""
    lines = re.split(r"\r\n|\r|\n", text)
    return "\n".join("    " + "".join(c if c.isprintable() or c == "\t" else "�" for c in x) for x in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(plain(cell) for cell in row)} |" for row in rows)])
