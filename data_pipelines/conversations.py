"""Conversations made from real documents, with answers that can be checked against them.

A conversation is a user's turn (a piece of the document as a memory part, then the question as text) and the
assistant's answer; further questions about the same piece are further turns.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .settings import ConversationSettings

QUESTIONS = {
    "needles": "What is the magic number for {key}?",
    "docstring": "What does the docstring of {name} say?",
    "parameters": "What are the parameters of {name}?",
    "next_line": "Which line follows this one?\n{line}",
}
Conversation = tuple[list[dict[str, Any]], dict[str, Any]]
"""Messages, and what they are about."""


def make_conversations(
    text: str, settings: ConversationSettings, rng: random.Random, code: list[Function] | None = None
) -> Iterator[Conversation]:
    """Conversations about `text`, at most `per_document` and about `per_kilobyte` per 1,000 characters.

    :param code: the document's functions, where it is Python; the kinds docstring and parameters ask about
    them.
    """
    count = min(settings.per_document, max(1, round(len(text) * settings.per_kilobyte / 1000)))
    if settings.kind == "needles":
        makers = (_needles(text, settings, rng) for _ in range(count))
        yield from (made for made in makers if made)
    elif settings.kind == "next_line":
        yield from _next_lines(text, settings, rng, count)
    else:
        asked = [function for function in code or [] if _about(function, settings.kind)]
        rng.shuffle(asked)
        lines = text.split("\n")
        made = (_function(lines, function, settings, rng) for function in asked)
        for _, conversation in zip(range(count), filter(None, made), strict=False):
            yield conversation


def _turns(
    context: str, pairs: list[tuple[str, str]], settings: ConversationSettings, rng: random.Random
) -> list:
    """Messages: the first question comes with the context, compressed or (`uncompressed` of them) as it
    is."""
    kind = "text" if rng.random() < settings.uncompressed else "memory"
    messages: list[dict[str, Any]] = []
    for question, answer in pairs:
        content: Any = question
        if not messages:
            content = [{"type": kind, "text": context}, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _question(settings: ConversationSettings, **names: str) -> str:
    return _fill(settings.question or QUESTIONS[settings.kind], **names)


def _fill(template: str, **names: str) -> str:
    """Put values in place of {name}; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda match: names.get(match[1], match[0]), template)


def _needles(text: str, settings: ConversationSettings, rng: random.Random) -> Conversation | None:
    """Plant facts in a piece of the text, each in place of a line's end where there is one."""
    length = rng.randint(*settings.context)
    count = rng.randint(*settings.needles)
    keys = rng.sample(settings.keys, count)
    values = [str(rng.randrange(10**settings.digits)).zfill(settings.digits) for _ in keys]
    facts = [_fill(settings.needle, key=key, value=value) for key, value in zip(keys, values, strict=True)]
    while sum(map(len, facts)) >= length and len(facts) > 1:
        facts.pop()
    room = length - sum(map(len, facts))
    if room < 1 or len(text) < room:
        return None
    start = rng.randint(0, len(text) - room)
    context = text[start : start + room]
    places = [match.start() for match in re.finditer("\n", context)]
    if len(places) < len(facts):
        places = list(range(room))
    chosen = sorted(rng.sample(places, min(len(facts), len(places))), reverse=True)
    facts, keys, values = facts[: len(chosen)], keys[: len(chosen)], values[: len(chosen)]
    for fact, place in zip(reversed(facts), chosen, strict=True):
        whole_line = fact.endswith("\n") and context[place] == "\n"
        context = context[:place] + fact + context[place + 1 if whole_line else place :]
    order = rng.sample(range(len(facts)), len(facts) if settings.ask == "all" else 1)
    pairs = [
        (_question(settings, key=keys[i], value=""), _fill(settings.answer, key=keys[i], value=values[i]))
        for i in order
    ]
    meta = {"kind": "needles", "needles": len(facts), "start": start}
    return _turns(context, pairs, settings, rng), meta


@dataclass(frozen=True)
class Function:
    """A function of a Python document. Lines are counted from 0; `docstring` is its first paragraph, in one
    line."""

    name: str
    parameters: str
    docstring: str
    first_line: int
    body_line: int
    docstring_line: int


def functions(text: str) -> list[Function]:
    """Functions and methods of Python source whose name occurs once; none if it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes = list(_definitions(tree.body))
    names = Counter(node.name for node in nodes)
    return [_describe(node) for node in nodes if names[node.name] == 1]


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions in a module's body and in its classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body)


def _describe(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    arguments = node.args
    names = [a.arg for a in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [a.arg for a in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
    end = node.body[0].lineno - 1
    if paragraph:
        end += len(paragraph.splitlines()) - 1
    return Function(
        node.name,
        ", ".join(names),
        " ".join(paragraph.split()),
        node.lineno - 1,
        node.body[0].lineno - 1,
        end,
    )


def _about(function: Function, kind: str) -> bool:
    return bool(function.docstring if kind == "docstring" else function.parameters)


def _function(
    lines: list[str], function: Function, settings: ConversationSettings, rng: random.Random
) -> Conversation | None:
    """A question about one function; the piece holds its `def` and, if asked for, its docstring's first
    paragraph."""
    asked_docstring = settings.kind == "docstring"
    last = function.docstring_line if asked_docstring else max(function.first_line, function.body_line - 1)
    context = _whole_lines(lines, function.first_line, last, rng.randint(*settings.context), rng)
    answer = function.docstring if asked_docstring else function.parameters
    readable = " ".join((context or "").split())
    if context is None or (asked_docstring and answer not in readable):
        return None
    pairs = [(_question(settings, name=function.name, line=""), answer)]
    meta = {"kind": settings.kind, "function": function.name, "line": function.first_line + 1}
    return _turns(context, pairs, settings, rng), meta


def _whole_lines(lines: list[str], first: int, last: int, length: int, rng: random.Random) -> str | None:
    """At most `length` characters of whole lines that hold lines `first` to `last`, grown at random on both
    sides."""
    room = length - sum(len(line) + 1 for line in lines[first : last + 1])
    if room < 0:
        return None
    while True:
        above = first > 0 and len(lines[first - 1]) + 1 <= room
        below = last + 1 < len(lines) and len(lines[last + 1]) + 1 <= room
        if not above and not below:
            return "\n".join(lines[first : last + 1]) + "\n"
        if above and (not below or rng.random() < 0.5):
            first -= 1
            room -= len(lines[first]) + 1
        else:
            last += 1
            room -= len(lines[last]) + 1


def _next_lines(
    text: str, settings: ConversationSettings, rng: random.Random, count: int
) -> Iterator[Conversation]:
    """Questions about the line that follows one that occurs once in the piece."""
    lines = text.split("\n")
    places = [i for i in range(len(lines) - 1) if lines[i].strip() and lines[i + 1].strip()]
    rng.shuffle(places)
    made = 0
    for place in places:
        if made == count:
            return
        context = _whole_lines(lines, place, place + 1, rng.randint(*settings.context), rng)
        if context is None or context.split("\n").count(lines[place]) != 1:
            continue
        made += 1
        pairs = [(_question(settings, line=lines[place], name=""), lines[place + 1])]
        yield _turns(context, pairs, settings, rng), {"kind": "next_line", "line": place + 1}
