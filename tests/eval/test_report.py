from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from lclm.eval.record import read_run
from lclm.eval.report import summary, write_report
from lclm.eval.verdict import verdicts

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import probe, write_recipe, write_run


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes most of a report's time; tests of its words go without."""
    monkeypatch.setattr("lclm.eval.report.draw_all", lambda record: [])


def test_a_whole_run(tmp_path):
    run = write_run(tmp_path / "run", resumes=(100, 220))
    write_recipe(run, tmp_path / "data")
    page = write_report(run)
    html = page.read_text()
    text = (run / "report.md").read_text()
    assert page.name == "report.html" and page.stat().st_size < 1_500_000
    assert html.count("data:image/svg+xml;base64,") == len(list((run / "report").glob("*.svg"))) == 13
    assert not re.search(r'(src|href)="(?!data:)', html), "the page must stand alone"
    for path in re.findall(r"\]\((report/[^)]*)\)", text):
        assert (run / path).is_file()
    for words in (
        "Finished: 500 steps",
        "Restarted 2 times, after step 100, 220",
        "PSF-2.0",
        "versions.torch",
        "1 more in",
        "2 lines unc",
        "scratch 400 of 4,000 steps",
        "over budget",
        "≥ 0.85",
    ):
        assert words in html and words in text
    assert "Read <b>a</b>" not in html, "content must be escaped"
    assert "Absent" not in html
    assert "Reconstruction: tokens right" in summary(run)


def test_a_partial_run_says_what_is_absent(tmp_path):
    run = write_run(tmp_path / "run", upto=30, probes=False)
    html = write_report(run).read_text()
    text = (run / "report.md").read_text()
    for words in (
        "Not finished: step 30 (stage scratch)",
        "No probe has run yet",
        "the resolved recipe",
        "None were",
    ):
        assert words in html and words in text
    assert summary(run) == "No probe has run yet."


def test_planned_stages_that_have_not_begun_are_listed(tmp_path, no_plots):
    run = write_run(tmp_path / "run", upto=410)
    write_recipe(run, tmp_path / "data")
    write_report(run)
    rows = [line for line in (run / "report.md").read_text().splitlines() if line.endswith("not begun |")]
    assert [row.split(" | ")[0] for row in rows] == ["| encoder", "| joint", "| sft"]
    assert "| adapter |" in (run / "report.md").read_text()


def test_a_killed_run_with_half_a_line_and_repeated_steps(tmp_path, no_plots):
    run = write_run(tmp_path / "run", upto=60)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = json.loads(lines[-1])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**again, "loss": 123.0}) + "\n" + lines[5][:25])
    record = read_run(run)
    assert record.damaged == 1
    steps = [line["step"] for line in record.lines["train"]]
    assert steps == sorted(set(steps)) and record.lines["train"][-1]["loss"] == 123.0
    assert "1 lines of metrics.jsonl could not be read" in write_report(run).read_text()


def test_a_run_of_nothing_but_its_start(tmp_path):
    run = write_run(tmp_path / "run", upto=0)
    assert "Not finished: step 0" in write_report(run).read_text()


def test_no_run_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)


def test_the_report_is_the_same_when_written_again(tmp_path):
    run = write_run(tmp_path / "run", upto=20)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.parametrize(
    ("skill", "expected"),
    [(1.0, {"met"}), (0.4, {"met", "right sign, below the aim"}), (0.0, {"met", "not met"})],
)
def test_verdicts(skill, expected):
    rows = verdicts(json.loads(json.dumps(probe(skill))))
    assert {row.status for row in rows} == expected
    assert [row.ratio for row in rows] == sorted(row.ratio for row in rows)
    assert len(rows) == 2 * (1 + 1 + 2 * 3)


def test_a_verdict_without_aims_asks_for_the_sign():
    assert {row.status for row in verdicts(probe(0.3, aims={}))} == {"met"}
    missed = {row.figure for row in verdicts(probe(0.0, aims={})) if row.status != "met"}
    assert len(missed) == 4


def test_a_memory_that_helps_no_more_than_another_is_not_used():
    result = probe(1.0)
    for row in result["continuation"]:
        row["own"] = {"mean": 0.001, "low": -0.001, "high": 0.003}
    wrong = {row.figure for row in verdicts(result) if row.status == "not met"}
    assert wrong == {
        "Continuation: loss saved by the compressed context",
        "Continuation: share of the uncompressed context's saving",
    }


def test_other_latents_that_help_are_not_what_is_wanted():
    result = probe(1.0)
    for row in result["continuation"]:
        row["saved"]["shuffled"] = {"mean": 0.05, "low": 0.03, "high": 0.07}
    wrong = {row.figure for row in verdicts(result) if row.status == "not met"}
    assert wrong == {"Continuation: loss saved by another document's latents"}
