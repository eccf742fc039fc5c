"""The report of a run: `report.md` (with its plots beside it) and one self-contained `report.html`."""

from __future__ import annotations

import base64
import os
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from lclm.eval.plots import Plot, draw_all
from lclm.eval.record import RunRecord, read_run
from lclm.eval.templates import HTML, MARKDOWN
from lclm.eval.verdict import MET, MISSED, SIGN, UNKNOWN, Verdict, verdicts

FOLDER = "report"
STAGE_HEAD = ("stage", "learns (rate)", "steps", "time", "training loss at its end", "state")
DATA_HEAD = ("use", "data set", "kind", "samples", "text", "source and licence", "fingerprint")
PACKAGES = {
    "lclm",
    "torch",
    "transformers",
    "deepspeed",
    "webdataset",
    "datatrove",
    "omegaconf",
    "numpy",
    "peft",
}
MARKS = {MET: "met", SIGN: "part", MISSED: "missed", UNKNOWN: "quiet"}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.md`, `report/*.svg` and `report.html` into a run folder; returns the page.

    Works on a run that is unfinished, was restarted, or lacks parts, and says so in the report. ValueError
    when the folder has no metrics at all.
    """
    record = read_run(run_dir)
    plots = draw_all(record)
    facts = _facts(record, plots)
    folder = record.folder / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for plot in plots:
        _write(folder / f"{plot.name}.svg", plot.svg)
    _write(record.folder / "report.md", _fill(MARKDOWN, facts, html=False))
    page = record.folder / "report.html"
    _write(page, _fill(HTML, facts, html=True))
    return page


def summary(run_dir: str | Path) -> str:
    """The verdict table as plain text, for the end of a run on a terminal."""
    record = read_run(run_dir)
    if not record.probes:
        return "No probe has run yet."
    rows = [_verdict_row(row) for row in verdicts(record.probes[-1][1])]
    keys = ("ratio", "figure", "where", "value", "interval", "aim", "status")
    cells = [[f"{row[key]}x" if key == "ratio" else str(row[key]) for key in keys] for row in rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(keys))] if cells else []
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _fill(template: str, facts: dict[str, Any], *, html: bool) -> str:
    environment = Environment(autoescape=html, keep_trailing_newline=True)
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    environment.filters["block"] = _block
    environment.filters["compare"] = _compare
    environment.filters["cells"] = lambda row: " | ".join(str(cell).replace("|", "\\|") for cell in row)
    return environment.from_string(template).render(facts)


def _block(text: str) -> str:
    """A Markdown code block, by indentation, which no content can end."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _compare(text: str, truth: str) -> Markup:
    """`text` with what is unlike `truth` marked."""
    parts = []
    for kind, start, stop, _, _ in SequenceMatcher(None, text, truth, autojunk=False).get_opcodes():
        part = escape(text[start:stop])
        parts.append(
            part if kind == "equal" or not part else Markup('<span class="wrong">{}</span>').format(part)
        )
    return Markup("").join(parts)


def _facts(record: RunRecord, plots: list[Plot]) -> dict[str, Any]:
    step, result = record.probes[-1] if record.probes else (None, {})
    return {
        "title": f"Run {record.recipe.get('name') or record.folder.resolve().name}",
        "status": _status(record),
        "notes": _notes(record),
        "rows": [_verdict_row(row) for row in verdicts(result)],
        "probe_step": step,
        "probe_absent": [f"{what}: {why}" for what, why in (result.get("absent") or {}).items()],
        "plots": plots,
        "folder": FOLDER,
        "samples": [_sample(text) for text in result.get("texts", [])],
        "stage_head": STAGE_HEAD,
        "stages": _stage_rows(record),
        "data_head": DATA_HEAD,
        "datasets": [_dataset_row(manifest) for manifest in record.datasets],
        "provenance": _provenance(record.provenance),
        "absent": record.absent,
    }


def _status(record: RunRecord) -> str:
    last = record.last
    if not last:
        return "Nothing has been logged yet."
    seconds = last.get("seconds")
    took = f" in {_duration(seconds)} of training" if isinstance(seconds, (int, float)) else ""
    tokens = last.get("source_tokens")
    read = f", {_count(tokens)} source tokens read" if isinstance(tokens, (int, float)) else ""
    if record.finished:
        return f"Finished: {last['step']:,} steps{took}{read}."
    return f"Not finished: step {last['step']:,} (stage {last.get('stage', 'unknown')}){took}{read}."


def _notes(record: RunRecord) -> list[str]:
    notes = []
    resumed = record.events("resume")
    if resumed:
        steps = ", ".join(f"{line['step']:,}" for line in resumed[:12])
        notes.append(f"Restarted {len(resumed)} time{'s' if len(resumed) > 1 else ''}, after step {steps}.")
    notes += _fitted(record)
    skips = record.events("skip")
    if skips:
        reasons = sorted({str(line.get("reason", "unknown")) for line in skips})
        notes.append(f"{len(skips)} steps were skipped for not being finite: {' and '.join(reasons)}.")
    dropped = (record.lines.get("train") or [{}])[-1].get("dropped")
    if dropped:
        notes.append(
            "Data left out: " + ", ".join(f"{count:,} ({why})" for why, count in dropped.items()) + "."
        )
    if record.damaged:
        notes.append(
            f"{record.damaged} lines of metrics.jsonl could not be read (a killed run may leave one)."
        )
    losses = record.series("validation", "loss")[1]
    if len(losses):
        notes.append(f"Validation loss: {losses[-1]:.4f} nats per token at the last validation.")
    for name, words in (
        ("source_tokens_per_second", "source tokens"),
        ("positions_per_second", "decoder positions"),
    ):
        values = record.series("train", name)[1]
        if len(values):
            notes.append(f"Median speed: {_count(sorted(values)[len(values) // 2])} {words} a second.")
    memory = record.series("train", "memory_gib")[1]
    if len(memory):
        notes.append(f"Peak memory of the main process: {memory.max():.2f} GiB.")
    return notes


def _fitted(record: RunRecord) -> list[str]:
    """What fitting to a time limit made of the step counts."""
    asked, ran = record.requested.get("stages") or {}, record.recipe.get("stages") or {}
    changes = []
    for name, stage in ran.items():
        before = asked.get(name)
        if isinstance(stage, dict) and isinstance(before, dict):
            changes += [
                f"{name} {stage[unit]:,} of {before[unit]:,} {unit}"
                for unit in ("steps", "tokens")
                if before.get(unit) and stage.get(unit) and stage[unit] != before[unit]
            ]
    return [f"Budgets were fitted to the time allowed: {', '.join(changes)}."] if changes else []


def _verdict_row(row: Verdict) -> dict[str, Any]:
    interval = "–" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
    value = "–" if row.value is None else f"{row.value:.3f}"
    if row.unit.startswith("nats") and row.value is not None:
        value += " nats"
    return {
        "ratio": row.ratio, "figure": row.figure, "where": row.where, "value": value, "interval": interval,
        "aim": row.aim, "status": row.status, "mark": MARKS[row.status], "better": row.better,
    }  # fmt: skip


def _sample(text: dict[str, Any]) -> dict[str, Any]:
    parts = [("truth", text["truth"]), ("written", text["written"])]
    if text.get("context"):
        parts[:0] = [("read as latents", text["context"]), ("asked", text.get("question", ""))]
    titles = {"reconstruction": "Reconstruction", "answer": "Answer"}
    title = f"{titles.get(text['kind'], text['kind'])} at {text['ratio']}x"
    return {"title": title, "parts": parts, "truth": text["truth"]}


def _stage_rows(record: RunRecord) -> list[list[str]]:
    rows = [
        [
            stage.name,
            stage.learns or "–",
            f"{stage.steps:,} ({stage.first:,} to {stage.last:,})",
            "–" if stage.seconds is None else _duration(stage.seconds),
            "–" if stage.loss is None else f"{stage.loss:.4f}",
            "ended" if stage.ended else "not ended",
        ]
        for stage in record.stages()
    ]
    planned = (record.recipe.get("stages") or {}).get("order") or []
    seen = {row[0] for row in rows}
    return rows + [[name, "–", "0", "–", "–", "not begun"] for name in planned if name not in seen]


def _dataset_row(manifest: dict[str, Any]) -> list[str]:
    sources = [
        f"{source.get('name', 'unnamed')} ({source.get('licence') or 'licence not noted'})"
        for source in manifest.get("sources") or []
        if isinstance(source, dict)
    ]
    return [
        manifest["use"], f"{manifest.get('name', manifest['source'])} ({manifest['path']})",
        str(manifest.get("kind", "–")), f"{manifest.get('samples', 0):,}",
        f"{manifest.get('text_bytes', 0) / 1e6:,.2f} MB", "; ".join(sources) or "not noted",
        str(manifest.get("fingerprint", "–"))[:12],
    ]  # fmt: skip


def _provenance(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance as rows: the versions that matter most, the size of a diff, the rest as it is."""
    shown = dict(provenance)
    if isinstance(versions := shown.get("versions"), dict):
        shown["versions"] = {name: version for name, version in versions.items() if name.lower() in PACKAGES}
        if rest := len(versions) - len(shown["versions"]):
            shown["versions"]["others"] = f"{rest} more in provenance.json"
    if isinstance(diff := shown.get("diff"), str):
        lines = len(diff.splitlines())
        shown["diff"] = f"{lines:,} lines uncommitted, in provenance.json" if lines else "nothing uncommitted"
    return _flat(shown)


def _flat(value: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested provenance as (dotted name, short value)."""
    rows: list[tuple[str, str]] = []
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            rows += _flat(inner, f"{before}{name}.")
        else:
            text = str(inner)
            rows.append(
                (
                    f"{before}{name}",
                    text if len(text) <= 200 else f"{text[:200]} … ({len(text):,} characters)",
                )
            )
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )


def _count(number: float) -> str:
    for limit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{word}"
    return f"{number:.0f}"
