"""The report's plots: one idea each, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lclm.eval.record import RunRecord

COLOURS = {
    "compressed": "#0072B2", "none": "#7a7a7a", "shuffled": "#D55E00", "uncompressed": "#009E73",
    "encoder": "#0072B2", "adapter": "#D55E00", "decoder": "#009E73", "brackets": "#CC79A7", "all": "#333333",
}  # fmt: skip
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#333333")
LABELS = {
    "compressed": "context compressed", "none": "no context", "shuffled": "another document's latents",
    "uncompressed": "context uncompressed",
}  # fmt: skip
WAYS = ("none", "shuffled", "compressed", "uncompressed")
MOST_POINTS = 400
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7, "axes.edgecolor": "#999999", "legend.frameon": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "lines.linewidth": 1.6, "svg.hashsalt": "lclm",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A finished plot: file stem, section of the report, one line of explanation, and the SVG."""

    name: str
    section: str
    caption: str
    svg: str


def draw_all(record: RunRecord) -> list[Plot]:
    """Every plot that the run has figures for, in the report's order."""
    return [Plot(name, section, caption, _svg(figure)) for name, section, figure, caption in _drawn(record)]


def draw_png(record: RunRecord, names: Container[str]) -> list[tuple[str, str, bytes]]:
    """(name, caption, PNG file) of the plots of these names, the same bytes every time."""
    found = []
    for name, _, figure, caption in _drawn(record, names):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        found.append((name, caption, buffer.getvalue()))
    return found


def _drawn(record: RunRecord, names: Container[str] | None = None) -> Iterator[tuple[str, str, Figure, str]]:
    """(name, section, figure, caption) of the plots that the run has figures for."""
    specs: list[tuple[str, str, Callable[[RunRecord], tuple[Figure, str] | None]]] = [
        ("saved", "memory", saved_over_steps),
        ("continuation", "memory", continuation_now),
        ("reconstruction", "memory", reconstruction_over_steps),
        ("needles", "memory", needles_over_steps),
        ("loss", "training", lambda r: losses(r, "train")),
        ("validation", "training", lambda r: losses(r, "validation")),
        ("speed", "training", speed),
        ("step_time", "training", step_time),
        ("step_shares", "training", step_shares),
        ("rates", "training", learning_rates),
        ("grad_norm", "training", grad_norms),
        ("waste", "training", waste),
        ("device", "training", device),
    ]
    for name, section, draw in specs:
        if names is None or name in names:
            with rc_context(STYLE):
                drawn = draw(record)
                if drawn is not None:
                    yield name, section, *drawn


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _axes(columns: int = 1, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])


def _thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means over equal groups of neighbouring points."""
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` values to either side, fewer at the ends; below 2 the values as they are."""
    if width < 2:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - width, 0), np.minimum(place + width + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _stages(axes: Axes, record: RunRecord, *, names: bool = True) -> None:
    """Stage limits as thin lines, with names above the axes, where there is more than one stage."""
    stages = record.stages()
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    if len(stages) < 2:
        return
    whole = max(stage.last for stage in stages) or 1
    level, reached = 0, -1.0
    for place, stage in enumerate(stages):
        if place:
            axes.axvline(stage.first - 0.5, color="#bbbbbb", linewidth=0.8, linestyle=":")
        if not names:
            continue
        level = (level + 1) % 2 if stage.first / whole < reached else 0
        reached = stage.first / whole + 0.012 * len(stage.name) + 0.01
        axes.annotate(
            stage.name, (stage.first, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3 + 10 * level),
            textcoords="offset points", fontsize=7.5, color="#777777", ha="left",
        )  # fmt: skip


def _legend(axes: Axes, *, outside: bool = True) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles and outside:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    elif handles:
        axes.legend(handles, labels, fontsize=9)


def _runs(steps: np.ndarray, values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The series cut where it pauses (a component that does not learn in some stage has no figures there)."""
    gaps = np.diff(steps)
    cuts: Any = np.flatnonzero(gaps > 3 * np.median(gaps)) + 1 if len(gaps) else []
    return list(zip(np.split(steps, cuts), np.split(values, cuts), strict=True))


def _curve(
    axes: Axes, x: np.ndarray, y: np.ndarray, style: dict[str, Any], *, width: int, faint: bool
) -> None:
    """One line, a running mean over `width` points to either side, over its faint raw values if `faint`."""
    if width > 1 and faint:
        axes.plot(*_thin(x, y), color=style["color"], alpha=0.18, linewidth=0.8)
    marker = "o" if width < 2 and len(x) < 30 else None
    axes.plot(*_thin(x, _smooth(y, width)), marker=marker, markersize=3, **style)


def _lines(
    record: RunRecord,
    kind: str,
    path: str,
    label: str,
    *,
    log: bool = False,
    smooth: bool = False,
    scale: float = 1.0,
    words: dict[str, str] | None = None,
) -> tuple[Figure, Axes] | None:
    """One line per key of the figure `path` (those of `words` only, under these words, if given)."""
    names = [name for name in record.names(kind, path) if words is None or name in words]
    figure, (axes,) = _axes()
    drawn = False
    for place, name in enumerate(names):
        steps, values = record.series(kind, path, name)
        if not len(steps):
            continue
        drawn = True
        component, _, variant = name.partition(".")
        style = {"color": COLOURS.get(component, CYCLE[place % len(CYCLE)])}
        style["linestyle"] = {"muon": "--", "plain": ":"}.get(variant, "-")
        for part, (x, y) in enumerate(_runs(steps, values * scale)):
            text = None if part else (words or {}).get(name, name)
            width = len(steps) // 30 if smooth else 0
            _curve(axes, x, y, style | {"label": text}, width=width, faint=len(names) < 5)
    if not drawn:
        return None
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(label)
    _stages(axes, record)
    _legend(axes)
    return figure, axes


def losses(record: RunRecord, kind: str) -> tuple[Figure, str] | None:
    """Loss per task, in training or in validation."""
    drawn = _lines(record, kind, "task_loss", "nats per loss-bearing token", smooth=True)
    if drawn is None:
        return None
    drawn[1].set_ylim(bottom=0)
    if kind == "train":
        return drawn[0], "Training loss per task (line: running mean; faint: as logged)."
    return drawn[0], "Validation loss per task, on held-out data."


def learning_rates(record: RunRecord) -> tuple[Figure, str] | None:
    """Learning rate of each parameter group."""
    drawn = _lines(record, "train", "lr", "learning rate", log=True)
    return (drawn[0], "Learning rate of each group of parameters.") if drawn else None


def grad_norms(record: RunRecord) -> tuple[Figure, str] | None:
    """Gradient norm of each component."""
    drawn = _lines(record, "train", "grad_norm", "gradient norm", log=True, smooth=True)
    return (drawn[0], "Gradient norm of each component that learns, before clipping.") if drawn else None


def waste(record: RunRecord) -> tuple[Figure, str] | None:
    """Padding as a share of each budget."""
    drawn = _lines(record, "train", "waste", "padding, % of the budget", smooth=True, scale=100)
    if drawn is None:
        return None
    drawn[1].set_ylim(bottom=0)
    return drawn[
        0
    ], "Padding: the share of each fixed budget (decoder positions, encoder rows, latents) left empty."


def _named(record: RunRecord, names: dict[str, str], label: str, scale: float = 1.0) -> Figure | None:
    """One line per top-level figure of the training lines."""
    figure, (axes,) = _axes()
    drawn = False
    for place, (name, text) in enumerate(names.items()):
        steps, values = record.series("train", name)
        if len(steps):
            drawn = True
            style = {"color": CYCLE[place], "label": text}
            _curve(axes, steps, values * scale, style, width=len(steps) // 30, faint=True)
    if not drawn:
        return None
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _stages(axes, record)
    _legend(axes)
    return figure


def speed(record: RunRecord) -> tuple[Figure, str] | None:
    """Tokens per second before and after compression."""
    names = {
        "source_tokens_per_second": "source tokens\n(before compression)",
        "positions_per_second": "decoder positions\n(after compression)",
    }
    figure = _named(record, names, "per second, thousands", 1e-3)
    return (
        (figure, "Speed, all processes together: what was read, and what the decoder saw of it.")
        if figure
        else None
    )


def step_time(record: RunRecord) -> tuple[Figure, str] | None:
    """Seconds a step takes."""
    figure = _named(record, {"step_seconds": "one step"}, "milliseconds", 1e3)
    return (figure, "Time of one optimizer step.") if figure else None


def step_shares(record: RunRecord) -> tuple[Figure, str] | None:
    """Shares of the step beside forward and backward passes."""
    words = {"data": "waiting for data", "update": "optimizer step", "other": "everything else"}
    drawn = _lines(record, "train", "time", "% of the step", smooth=True, scale=100, words=words)
    if drawn is None:
        return None
    drawn[1].set_ylim(bottom=0)
    return drawn[0], "Time of a step beside the forward and backward passes of the model."


def device(record: RunRecord) -> tuple[Figure, str] | None:
    """MFU, beside the peak memory."""
    figure = _named(record, {"mfu": "MFU"}, "% of the peak rate", 100)
    return (figure, "Model FLOPs utilisation.") if figure else None


def _rows(result: dict, probe: str, **wanted: Any) -> list[dict]:
    return [
        row for row in result.get(probe, []) if all(row.get(key) == value for key, value in wanted.items())
    ]


def continuation_now(record: RunRecord) -> tuple[Figure, str] | None:
    """The four losses at the last probe, a panel per ratio, with intervals."""
    rows = record.probes[-1][1].get("continuation", []) if record.probes else []
    if not rows:
        return None
    ratios = sorted({row["ratio"] for row in rows})
    figure, panels = _axes(len(ratios))
    for axes, ratio in zip(panels, ratios, strict=True):
        chosen = sorted((row for row in rows if row["ratio"] == ratio), key=lambda row: row["context_tokens"])
        for offset, way in zip(np.linspace(-0.24, 0.24, len(WAYS)), WAYS, strict=True):
            with_way = [(place, row["loss"][way]) for place, row in enumerate(chosen) if way in row["loss"]]
            _points(axes, [place + offset for place, _ in with_way], [value for _, value in with_way], way)
        axes.set_xticks(range(len(chosen)), [f"{row['context_tokens']}" for row in chosen])
        axes.set_xlim(-0.6, len(chosen) - 0.4)
        axes.set_xlabel("context, tokens")
        axes.set_title(f"{ratio}x")
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("loss of what follows,\nnats per token")
    _legend(panels[-1])
    return figure, (
        f"Loss of the same next tokens under four contexts at step {record.probes[-1][0]} "
        "(lower is better; bars: 95% intervals of each mean; they move together, "
        "so compare the differences in the plot above)."
    )


def _points(axes: Axes, x: list[float], values: list[dict], way: str) -> None:
    mean = np.asarray([value["mean"] for value in values], float)
    low = np.asarray([v["mean"] if v["low"] is None else v["low"] for v in values], float)
    high = np.asarray([v["mean"] if v["high"] is None else v["high"] for v in values], float)
    errors = np.maximum([mean - low, high - mean], 0)
    axes.errorbar(x, mean, errors, fmt="o", markersize=6, capsize=3, color=COLOURS[way], label=LABELS[way])


def _over_steps(
    axes: Axes, record: RunRecord, pick: Callable[[dict], dict | None], style: dict[str, Any]
) -> bool:
    """One figure over the probes' steps with its interval as a band."""
    found = [
        (step, value)
        for step, result in record.probes
        if (value := pick(result)) and value["mean"] is not None
    ]
    if not found:
        return False
    steps = [step for step, _ in found]
    axes.plot(steps, [value["mean"] for _, value in found], marker="o", markersize=3.5, **style)
    sure = [(step, value) for step, value in found if value["low"] is not None]
    axes.fill_between(
        [s for s, _ in sure], [v["low"] for _, v in sure], [v["high"] for _, v in sure],
        color=style["color"], alpha=0.13, linewidth=0,
    )  # fmt: skip
    return True


def _by_ratio(record: RunRecord, probe: str) -> list[int]:
    return sorted({row["ratio"] for _, result in record.probes for row in result.get(probe, [])})


def saved_over_steps(record: RunRecord) -> tuple[Figure, str] | None:
    """Loss saved against no context over steps, a panel per ratio, at the longest context."""
    ratios = _by_ratio(record, "continuation")
    if not ratios:
        return None
    rows = [row for _, result in record.probes for row in result.get("continuation", [])]
    longest = max(row["context_tokens"] for row in rows)
    figure, panels = _axes(len(ratios))
    for axes, ratio in zip(panels, ratios, strict=True):
        axes.axhline(0, color=COLOURS["none"], linewidth=1, linestyle="--")
        for way in WAYS[1:]:

            def pick(result: dict, ratio: int = ratio, way: str = way) -> dict | None:
                rows = _rows(result, "continuation", ratio=ratio, context_tokens=longest)
                return rows[0]["saved"].get(way) if rows else None

            _over_steps(axes, record, pick, {"color": COLOURS[way], "label": LABELS[way]})
        axes.set_title(f"{ratio}x")
        _stages(axes, record, names=False)
    panels[0].set_ylabel("loss saved against\nno context, nats per token")
    _legend(panels[-1])
    return figure, (
        f"Loss that a context of {longest} tokens saves on what follows it, against none: the same tokens "
        "compared one by one (bands: 95% intervals of the difference; dashes: nothing saved)."
    )


def reconstruction_over_steps(record: RunRecord) -> tuple[Figure, str] | None:
    """Reconstruction accuracy over steps, a line per ratio and length."""
    kinds = sorted(
        {(r["ratio"], r["context_tokens"]) for _, p in record.probes for r in p.get("reconstruction", [])}
    )
    if not kinds:
        return None
    figure, (axes,) = _axes()
    for place, (ratio, length) in enumerate(kinds):

        def pick(
            result: dict, ratio: int = ratio, length: int = length, way: str = "compressed"
        ) -> dict | None:
            rows = _rows(result, "reconstruction", ratio=ratio, context_tokens=length)
            return rows[0]["accuracy"].get(way) if rows else None

        colour = CYCLE[place % len(CYCLE)]
        _over_steps(axes, record, pick, {"color": colour, "label": f"{ratio}x, {length} tokens"})
        last = pick(record.probes[-1][1], way="shuffled")
        if last and place == len(kinds) - 1:
            axes.axhline(last["mean"], color="#7a7a7a", linestyle="--", linewidth=1)
            axes.annotate(
                "another document's latents", (1, last["mean"]), xycoords=("axes fraction", "data"),
                ha="right", xytext=(0, 3), textcoords="offset points", fontsize=8, color="#777777",
            )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of tokens right")
    _stages(axes, record)
    _legend(axes)
    return (
        figure,
        "Reconstruction: tokens right when a compressed text is repeated word for word "
        "(bands: 95% intervals).",
    )


def needles_over_steps(record: RunRecord) -> tuple[Figure, str] | None:
    """Digits right over steps, a panel per ratio: with the memory, without it, uncompressed."""
    ratios = _by_ratio(record, "needle")
    if not ratios:
        return None
    figure, panels = _axes(len(ratios))
    for axes, ratio in zip(panels, ratios, strict=True):
        for way in ("compressed", "uncompressed", "none"):

            def pick(result: dict, ratio: int = ratio, way: str = way) -> dict | None:
                rows = _rows(result, "needle", ratio=ratio, numbers="one") or _rows(
                    result, "needle", ratio=ratio
                )
                return rows[0]["digits"].get(way) if rows else None

            _over_steps(axes, record, pick, {"color": COLOURS[way], "label": LABELS[way]})
        axes.axhline(0.1, color="#bbbbbb", linestyle="--", linewidth=1)
        axes.set_title(f"{ratio}x")
        _stages(axes, record, names=False)
    panels[0].set_ylim(0, 1.02)
    panels[0].set_ylabel("share of digits right")
    _legend(panels[-1])
    return (
        figure,
        "Needles: digits right of a number asked for (bands: 95% intervals; dashes: a guess, one in ten).",
    )
