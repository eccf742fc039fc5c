"""Examples as the model reads them: what is compressed, what is read, and where loss falls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from lclm.data.batch import make_lanes
from lclm.data.settings import DataSettings
from lclm.model.spans import Example, Geometry, Span
from lclm.model.text import SpanTokenizer

STYLES = {"memory": "cyan", "loss": "green", "text": "default"}
MOST_CHARACTERS = 600
"""Characters of a span that are shown; the middle of a longer one is left out."""


def examples(
    settings: DataSettings,
    tokenizer: SpanTokenizer,
    geometry: Geometry,
    *,
    seed: int = 0,
    ratios: Sequence[int] | None = None,
    task: str | None = None,
    samples: int = 1,
) -> Iterator[Example]:
    """The first examples of lane 0, `samples` of each task in the mixture, or of `task` alone.

    ValueError for a task that the recipe does not have.
    """
    if task is not None:
        settings.validate_mixture({task: 1.0}, "--task")
    mixture = settings.mixture if task is None else {task: 1.0}
    (lane,) = make_lanes(settings, tokenizer, geometry, [0], seed=seed, mixture=mixture, ratios=ratios)
    missing = Counter({name: samples for name, share in mixture.items() if share > 0})
    for _ in range(200 * samples):
        pack = lane.next_pack()
        for example in pack.examples:
            if missing[example.task] > 0:
                missing[example.task] -= 1
                yield example
        if not pack.examples or not any(count > 0 for count in missing.values()):
            return


def describe(example: Example, tokenizer: SpanTokenizer, geometry: Geometry) -> Text:
    """One example as text for a terminal; it reads the same without colours."""
    size = geometry.size(example)
    loss = sum(len(span.ids) for span in example.spans if span.loss)
    loss -= int(example.spans[0].loss)
    text = Text()
    text.append(f"{example.task}  {example.key}\n", style="bold")
    text.append(
        f"{size.positions} decoder positions ({size.latents} slots, {loss} with loss), "
        f"{sum(size.windows)} encoder tokens in {len(size.windows)} windows\n"
    )
    for span in example.spans:
        label, style = _label(span, geometry)
        text.append(f"[{label}]\n", style=f"dim {style}" if style != "default" else "dim")
        text.append(f"{_shortened(_words(span, tokenizer))}\n", style=style)
    return text


def _label(span: Span, geometry: Geometry) -> tuple[str, str]:
    tokens = f"{len(span.ids)} token{'s' if len(span.ids) > 1 else ''}"
    if span.kind == "memory":
        ratio = geometry.span_ratio(span)
        return f"memory: {tokens} read as {geometry.latents(len(span.ids), ratio)} slots, {ratio}x", STYLES[
            "memory"
        ]
    if span.loss:
        return f"text with loss: {tokens}", STYLES["loss"]
    return f"text: {tokens}", STYLES["text"]


def _words(span: Span, tokenizer: SpanTokenizer) -> str:
    if span.kind == "memory":
        return tokenizer.encoder_content.decode(span.ids)
    return tokenizer.tokenizer.decode(span.ids.tolist(), skip_special_tokens=False)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def inspect(
    settings: DataSettings, tokenizer: SpanTokenizer, geometry: Geometry, **options: Any
) -> Iterator[Text]:
    """`describe` for each of `examples(...)`, which takes the same options."""
    for example in examples(settings, tokenizer, geometry, **options):
        yield describe(example, tokenizer, geometry)
