"""What a pack holds: measured by packing a recipe's data where they are at hand, else reckoned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lclm.data.settings import DataSettings

PACKS = 24
FULL = 0.97
"""Share of the budget that binds which packs are reckoned to fill."""
CHAT_MEMORY, CHAT_LOSS = 0.8, 0.1
"""Shares of a conversation's tokens that are reckoned to be compressed, and to bear loss."""


@dataclass(frozen=True)
class Filling:
    """One pack of a stage, on average.

    source_tokens: before compression. loss_tokens: that bear loss. segments: mean length of what a token of
    encoder and decoder can see parts of (weighted by tokens). notes: what was assumed.
    """

    source_tokens: float
    loss_tokens: float
    segments: tuple[float, float]
    measured: bool = False
    notes: list[str] = field(default_factory=list)


def filling(recipe: Any, stage: str, window: int, row_length: int) -> Filling:
    """The stage's mixture in its packs. window, row_length: of the model, in encoder tokens."""
    settings = recipe.stage_data(stage)
    try:
        return _measured(recipe, settings)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        return _reckoned(recipe, settings, window, row_length, reason)


def _measured(recipe: Any, settings: DataSettings) -> Filling:
    from lclm.data.batch import make_lanes
    from lclm.data.shards import DataSet

    for source in settings.sources.values():
        DataSet.open(source.path)
    from lclm.model.build import build_config, build_processor

    config = build_config(recipe.model)
    geometry = config.geometry()
    lanes = make_lanes(
        settings,
        build_processor(recipe.model).spans,
        geometry,
        range(min(2, settings.lanes)),
        seed=recipe.seed,
        mixture=settings.mixture,
        ratios=config.ratios,
    )
    packs = [lane.next_pack() for _ in range(PACKS // len(lanes)) for lane in lanes]
    packs = [pack for pack in packs if pack.examples]
    if not packs:
        raise ValueError("the data fill no pack")
    examples = [geometry.size(example) for pack in packs for example in pack.examples]
    windows = [window for size in examples for window in size.windows]
    spans = [span for pack in packs for example in pack.examples for span in example.spans]
    return Filling(
        sum(sum(pack.source_tokens.values()) for pack in packs) / len(packs),
        sum(len(span.ids) for span in spans if span.loss) / len(packs),
        (_weighted(windows), _weighted([size.positions for size in examples])),
        measured=True,
    )


def _weighted(lengths: list[int]) -> float:
    return sum(n * n for n in lengths) / sum(lengths) if sum(lengths) else 1.0


def _reckoned(recipe: Any, settings: DataSettings, window: int, row_length: int, reason: str) -> Filling:
    """From the shares of the mixture, the options of its tasks and the pack's budgets."""
    ratio = recipe.model.ratio or (recipe.model.ratios or [16])[0]
    positions = rows = loss = 0.0
    shares = sum(settings.mixture.values())
    chat = False
    for name, share in settings.mixture.items():
        task = settings.tasks[name]
        mean = sum(task.ratios) / len(task.ratios) if task.ratios else ratio
        if task.task == "plain":
            per = (1.0, 0.0, 1.0)
        elif task.task == "interleave":
            least, most = task.option("min_span"), task.option("max_span")
            span = (most - least) / math.log(most / least) if most > least else least
            memory = task.option("memory_share")
            per = (1 - memory + memory * (1 / mean + 2 / span), memory, 1 - memory)
        elif task.task == "reconstruct":
            span = math.sqrt(task.option("min_span") * task.option("max_span"))
            said = (task.option("excerpt") or span) / span
            per = (1 / mean + said, 1.0, said)
        else:
            per, chat = (1 - CHAT_MEMORY + CHAT_MEMORY / mean, CHAT_MEMORY, CHAT_LOSS), True
        positions, rows, loss = (
            before + share / shares * value
            for before, value in zip((positions, rows, loss), per, strict=True)
        )
    pack = settings.pack
    tokens = FULL * min(pack.positions / positions, pack.rows * row_length / rows if rows else math.inf)
    notes = [
        f"tokens of a pack are reckoned from budgets and mixture, {FULL:.0%} of the binding budget full "
        f"({reason})",
        f"attention is reckoned over whole packs of {pack.positions:,} positions and whole windows of "
        f"{min(window, row_length):,} tokens: shorter examples cost less",
    ]
    if chat:
        notes.append(
            f"of conversations, {CHAT_MEMORY:.0%} of the tokens are assumed to be compressed and "
            f"{CHAT_LOSS:.0%} to bear loss"
        )
    segments = (float(min(window, row_length)), float(pack.positions))
    return Filling(tokens, min(tokens * loss, pack.positions - 1), segments, notes=notes)
