"""Chat templates around content that must stay content.

Every part is replaced by a random private placeholder, the template is rendered, and the result is split at
the placeholders: what lies between is the template's own text. A template that alters, repeats, reorders or
drops a placeholder is an error.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation, in order.

    kind: "template" (the template's own text, trusted), "text" or "memory" (content). loss: on content, its
    tokens bear loss; on template text, its end-of-turn token does. sizes: latents of each memory of an
    artifact, which has no text.
    """

    kind: Literal["template", "text", "memory"]
    text: str
    loss: bool = False
    ratio: int | None = None
    sizes: tuple[int, ...] = ()


def parts_of(message: dict[str, Any], number: int) -> list[Piece]:
    """The content of one message as pieces. ValueError names the message and what is wrong with it."""
    where = f"message {number}"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {str(message)[:80]!r}")
    if unknown := sorted(set(message) - {"role", "content"}):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; only 'role' and 'content' are read")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ValueError(
            f"{where} has the role {role!r}; a role is one word such as system, user or assistant"
        )
    loss = role == "assistant"
    if isinstance(content, str):
        return [Piece("text", content, loss)]
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"{where}: content must be a string or a list of parts, got {type(content).__name__}"
        )
    return [_part(part, f"{where}, part {index}", loss) for index, part in enumerate(content)]


def _part(part: Any, where: str, loss: bool) -> Piece:
    if not isinstance(part, dict) or part.get("type") not in ("text", "memory"):
        raise ValueError(
            f"{where} must be {{'type': 'text' | 'memory', 'text': ...}}, got {str(part)[:80]!r}"
        )
    memory = part["type"] == "memory"
    if memory and "artifact" in part:
        return _artifact(part, where)
    if unknown := sorted(set(part) - {"type", "text"} - ({"ratio"} if memory else set())):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{where} needs a 'text' that is a string")
    if not memory:
        return Piece("text", part["text"], loss)
    ratio = part.get("ratio")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1):
        raise ValueError(f"{where} has the ratio {ratio!r}; it must be a whole number of tokens per latent")
    if not part["text"]:
        raise ValueError(f"{where} is an empty memory: there is nothing to compress; leave the part out")
    return Piece("memory", part["text"], ratio=ratio)


def _artifact(part: dict[str, Any], where: str) -> Piece:
    if unknown := sorted(set(part) - {"type", "artifact"}):
        raise ValueError(
            f"{where} has {unknown[0]!r} beside an artifact, which has its text and ratio behind it"
        )
    sizes = getattr(part["artifact"], "sizes", None)
    if not isinstance(sizes, tuple):
        raise ValueError(
            f"{where} has a {type(part['artifact']).__name__} as its artifact; give what model.compress or "
            "Artifact.load returns"
        )
    return Piece("memory", "", sizes=sizes)


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool = False,
    template_options: dict[str, Any] | None = None,
    known: dict[Any, list[str]] | None = None,
) -> list[Piece]:
    """Messages through the tokenizer's chat template, as template text and content pieces in order.

    known: the template's own text by the shape of the conversation, which is all that a template gets to see;
    it is read and filled, so that many conversations of one shape are rendered once.
    """
    if not messages:
        raise ValueError("the conversation has no messages")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the decoder's tokenizer has no chat template; set tokenizer.chat_template or save one beside it"
        )
    contents: list[Piece] = []
    last_of_turn: set[int] = set()
    turns: list[tuple[str, int]] = []
    for number, message in enumerate(messages):
        pieces = parts_of(message, number)
        contents += pieces
        if message["role"] == "assistant" and pieces:
            last_of_turn.add(len(contents) - 1)
        turns.append((message["role"], len(pieces)))
    options = {"add_generation_prompt": add_generation_prompt, **(template_options or {})}
    shape = (str(tokenizer.chat_template), tuple(turns), repr(sorted(options.items())))
    between = (known or {}).get(shape)
    if between is None:
        between = _template_text(tokenizer, turns, options)
        if known is not None:
            known[shape] = between
    pieces = [Piece("template", between[0])] if between[0] else []
    for index, content in enumerate(contents):
        pieces.append(content)
        if after := between[index + 1]:
            pieces.append(Piece("template", after, loss=index in last_of_turn))
    return pieces


def _template_text(tokenizer: Any, turns: Sequence[tuple[str, int]], options: dict[str, Any]) -> list[str]:
    """What the template writes before, between and after the parts of turns of (role, parts)."""
    secret, count = secrets.token_hex(12), 0
    masked = []
    for role, parts in turns:
        names = [f"x{secret}x{count + i:06d}x" for i in range(parts)]
        masked.append({"role": role, "content": "".join(names)})
        count += parts
    first, *rest = tokenizer.apply_chat_template(masked, tokenize=False, **options).split(f"x{secret}x")
    between = [first, *(part[7:] for part in rest)]
    if [part[:7] for part in rest] != [f"{i:06d}x" for i in range(count)] or secret in "".join(between):
        raise ValueError(
            "the chat template alters, repeats, reorders or drops message content, so content cannot be kept "
            "apart from control tokens; use a template that writes each message's content once, as it is"
        )
    return between
