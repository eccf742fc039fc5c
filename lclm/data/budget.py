"""What a mixture needs of a pack's three budgets, measured, and the encoder rows and latents that suit it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lclm.data.batch import make_lanes
from lclm.data.packing import Lane
from lclm.data.settings import DataSettings, PackSettings
from lclm.data.tasks import Interleave, Reconstruct
from lclm.model.spans import Geometry
from lclm.model.text import SpanTokenizer

MEASURED_POSITIONS = 400_000
"""About how many decoder positions are packed to measure one shape."""
ROUGH_FILL = 0.985
"""Fill of the encoder rows that a first proposal reckons with."""


@dataclass(frozen=True)
class Fill:
    """How full packs of one shape get: mean share of positions, row tokens and latents, and of source tokens.

    latents: the most that a pack used. dropped: by "task: reason".
    """

    pack: PackSettings
    mean: tuple[float, float, float]
    latents: int
    shares: dict[str, float]
    dropped: dict[str, int]

    @property
    def good(self) -> bool:
        """At least 97% of the budget that binds and 93% of the other (positions, row tokens)."""
        return max(self.mean[:2]) >= 0.97 and min(self.mean[:2]) >= 0.93


def measure(
    settings: DataSettings,
    tokenizer: SpanTokenizer,
    geometry: Geometry,
    *,
    seed: int = 0,
    ratios: Sequence[int] | None = None,
    packs: int | None = None,
) -> Fill:
    """Pack the mixture of `settings` into its shape and say how full the packs get.

    packs: how many; None chooses by their size. The first packs of a lane are left out, since a mixture needs
    a few to settle.
    """
    lanes = _lanes(settings, tokenizer, geometry, seed, ratios)
    count = packs or min(120, max(12, MEASURED_POSITIONS // settings.pack.positions))
    used, tokens, dropped = [], Counter[str](), Counter[str]()
    for turn in range(-(-count // len(lanes)) + 2):
        for lane in lanes:
            pack = lane.next_pack()
            dropped.update(pack.dropped)
            if turn >= 2 and pack.examples:
                used.append(pack.used)
                tokens.update(pack.source_tokens)
    if not used:
        raise ValueError("one epoch fills too few packs to measure; use more data or smaller packs")
    shape = settings.pack
    capacity = np.array([shape.positions, shape.rows * geometry.row_length, shape.latents])
    mean = (np.array(used).mean(0) / capacity).tolist()
    total = sum(tokens.values())
    shares = {name: tokens[name] / total for name, share in settings.mixture.items() if share > 0}
    return Fill(shape, tuple(mean), max(row[2] for row in used), shares, dict(dropped))


def propose(
    settings: DataSettings,
    tokenizer: SpanTokenizer,
    geometry: Geometry,
    *,
    seed: int = 0,
    ratios: Sequence[int] | None = None,
) -> list[Fill]:
    """Measured shapes for the positions of `settings`: its own first, then proposals, best first."""
    lane = _lanes(settings, tokenizer, geometry, seed, ratios)[0]
    rows = demand(lane, settings.pack.positions) / geometry.row_length / ROUGH_FILL
    least = min(ratio for entry in lane.entries.values() for ratio in entry.task.ratios)
    fills = []
    for count in sorted({max(1, math.floor(rows)), max(1, math.ceil(rows))}):
        worst = -(-count * geometry.row_length // least)
        shape = replace(settings.pack, rows=count, latents=-(-worst * 9 // 8 // 8) * 8)
        fill = measure(replace(settings, pack=shape), tokenizer, geometry, seed=seed, ratios=ratios)
        fills.append(fill)
    fills.sort(key=lambda fill: (-fill.good, -min(fill.mean[:2])))
    return [measure(settings, tokenizer, geometry, seed=seed, ratios=ratios), *fills]


def demand(lane: Lane, positions: int) -> float:
    """Row tokens that the lane's mixture takes while it fills `positions`, interleave at its memory_share."""
    total_positions, total_rows = 0.0, 0.0
    for entry in lane.entries.values():
        lane.refill(entry)
        task, per_token = entry.task, (1.0, 0.0)
        ratio = sum(task.ratios) / len(task.ratios)
        if isinstance(task, Interleave):
            span = (
                (task.most - task.least) / math.log(task.most / task.least)
                if task.most > task.least
                else task.least
            )
            per_token = (1 - task.share + task.share * (1 / ratio + 2 / span), task.share)
        elif isinstance(task, Reconstruct):
            span = math.sqrt(task.least * task.most)
            per_token = ((span / ratio + (task.excerpt or span) + task.fixed) / span, 1.0)
        elif entry.waiting:
            cuts = [item.cut for item in entry.waiting]
            tokens = sum(cut.source_tokens for cut in cuts)
            windows = sum(sum(cut.size.windows) for cut in cuts)
            per_token = (sum(cut.size.positions for cut in cuts) / tokens, windows / tokens)
        total_positions += entry.share * per_token[0]
        total_rows += entry.share * per_token[1]
    return positions * total_rows / total_positions


def _lanes(
    settings: DataSettings,
    tokenizer: SpanTokenizer,
    geometry: Geometry,
    seed: int,
    ratios: Sequence[int] | None,
) -> list[Lane]:
    numbers = range(min(2, settings.lanes))
    options = {"seed": seed, "mixture": settings.mixture, "ratios": ratios}
    return make_lanes(settings, tokenizer, geometry, numbers, **options)  # type: ignore[arg-type]


def budget(
    settings: DataSettings,
    tokenizer: SpanTokenizer,
    geometry: Geometry,
    *,
    seed: int = 0,
    ratios: Sequence[int] | None = None,
    stages: Mapping[str, DataSettings] | None = None,
) -> str:
    """The table that `lclm data budget` prints: fills and waste of the recipe's packs, and proposals.

    stages: settings of each stage, with its own mixture and pack; stages alike are measured once.
    """
    cases: dict[str, list[str]] = {}
    known: dict[str, DataSettings] = {}
    for name, case in (stages or {"all stages": settings}).items():
        key = repr((sorted(case.mixture.items()), case.pack))
        cases.setdefault(key, []).append(name)
        known[key] = case
    parts = []
    for key, names in cases.items():
        fills = propose(known[key], tokenizer, geometry, seed=seed, ratios=ratios)
        parts.append(_table(", ".join(names), fills, geometry))
    return "\n\n".join(parts)


def _table(title: str, fills: Sequence[Fill], geometry: Geometry) -> str:
    lines = [
        f"{title}: how full packs get, positions x rows of {geometry.row_length} x latents",
        f"{'':10} {'shape':>20}  {'positions':>16}  {'row tokens':>16}  {'latents':>16}",
    ]
    for number, fill in enumerate(fills):
        shape = f"{fill.pack.positions} x {fill.pack.rows} x {fill.pack.latents}"
        cells = "  ".join(f"{part:6.1%} (-{1 - part:6.1%})" for part in fill.mean)
        lines.append(f"{'recipe' if number == 0 else 'proposal':10} {shape:>20}  {cells}")
    best = fills[1]
    shares = ", ".join(f"{name} {share:.3f}" for name, share in best.shares.items())
    lines += [
        f"shares of source tokens: {shares}",
        f"most latents in a pack of the first proposal: {best.latents}",
    ]
    if best.dropped:
        lines.append(f"left out or shortened: {', '.join(f'{k} {n}' for k, n in best.dropped.items())}")
    lines.append(
        f"pack: {{positions: {best.pack.positions}, rows: {best.pack.rows}, latents: {best.pack.latents}"
        + (f", attention: {best.pack.attention}}}" if best.pack.attention else "}")
        + ("" if best.good else "   # below 97% and 93%: add a task that can be cut (interleave, plain)")
    )
    return "\n".join(lines)
