"""From the probes' figures to a verdict: each figure with its interval, its aim, and whether it is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MET, SIGN, MISSED, UNKNOWN = "met", "right sign, below the aim", "not met", "not measured"


@dataclass(frozen=True)
class Verdict:
    """One figure of the use of memory. `better` compares it with the same question without this memory."""

    figure: str
    ratio: int
    where: str
    value: float | None
    low: float | None
    high: float | None
    unit: str
    aim: str
    status: str
    better: str = ""


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """The verdicts on one result of `run_probes`, by ratio."""
    aims = result.get("aims") or {}
    rows = [_reconstruction(row, aims) for row in result.get("reconstruction", [])]
    rows += [_digits(row, aims) for row in result.get("needle", [])]
    for row in result.get("continuation", []):
        rows += _continuation(row, aims)
    order = {name: place for place, name in enumerate(dict.fromkeys(row.figure for row in rows))}
    return sorted(rows, key=lambda row: (row.ratio, order[row.figure]))


def _aim(aims: dict, figure: str, ratio: int) -> float | None:
    by_ratio = aims.get(figure) or {}
    return by_ratio.get(ratio, by_ratio.get(str(ratio)))  # JSON has only text keys


def _judge(value: dict, gain: dict, least: float | None) -> str:
    """`value` against its aim; in any case `gain`, what the memory adds, must exceed 0 by its interval."""
    if value["mean"] is None:
        return UNKNOWN
    sure = gain["low"] is not None and gain["low"] > 0
    if least is None:
        return MET if sure else MISSED
    if value["mean"] >= least and sure:
        return MET
    return SIGN if sure else MISSED


def _row(
    figure: str, row: dict, where: str, value: dict, unit: str, aim: str, status: str, better: str = ""
) -> Verdict:
    return Verdict(
        figure, row["ratio"], where, value["mean"], value["low"], value["high"], unit, aim, status, better
    )


def _least(least: float | None, otherwise: str) -> str:
    return otherwise if least is None else f"≥ {least:g}"


def _reconstruction(row: dict, aims: dict) -> Verdict:
    least = _aim(aims, "reconstruction", row["ratio"])
    value = row["accuracy"]["compressed"]
    other = row["accuracy"].get("shuffled")
    better = f"{other['mean']:.3f} with another document's latents" if other else ""
    gain = row.get("gain") or value
    return _row(
        "Reconstruction: tokens right", row, f"{row['context_tokens']} tokens, {row['samples']} texts", value,
        "share",
        _least(least, "more than with another document's latents"), _judge(value, gain, least), better,
    )  # fmt: skip


def _digits(row: dict, aims: dict) -> Verdict:
    least = _aim(aims, "digits", row["ratio"]) if row["numbers"] == "one" else None
    value = row["digits"]["compressed"]
    without, full = row["digits"]["none"]["mean"], row["digits"]["uncompressed"]["mean"]
    where = (
        f"{row['samples']} questions, {row['numbers']} number{'s' if row['numbers'] != 'one' else ''} there"
    )
    return _row(
        "Needle: digits right", row, where, value, "share", _least(least, "more than without the memory"),
        _judge(value, row["gain"], least), f"{without:.3f} without the memory, {full:.3f} uncompressed",
    )  # fmt: skip


def _continuation(row: dict, aims: dict) -> list[Verdict]:
    where = f"{row['context_tokens']} tokens, {row['samples']} texts"
    saved, least = row["saved"], _aim(aims, "recovered", row["ratio"])
    own = row.get("own") or saved["compressed"]  # against another document's latents, where there are any
    loss = row["loss"]
    rows = [
        _row(
            "Continuation: loss saved by the compressed context", row, where, saved["compressed"],
            "nats per token", "> 0", _judge(saved["compressed"], own, None),
            f"{saved['uncompressed']['mean']:.3f} saved by the uncompressed one, "
            f"from {loss['none']['mean']:.3f} with none",
        ),
        _row(
            "Continuation: share of the uncompressed context's saving", row, where,
            row["recovered"]["compressed"], "share", _least(least, "> 0"),
            _judge(row["recovered"]["compressed"], own, least),
        ),
    ]  # fmt: skip
    if "shuffled" not in saved:
        return rows
    value = saved["shuffled"]
    status = UNKNOWN if value["low"] is None else (MET if value["low"] <= 0 else MISSED)
    rows.append(
        _row(
            "Continuation: loss saved by another document's latents", row, where, value, "nats per token",
            "none (interval reaches 0 or less)", status,
            f"the own document's latents save {own['mean']:.3f} more",
        )
    )  # fmt: skip
    return rows
