from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lclm.cli import app, main
from lclm.settings import shipped_recipes

COMMANDS = [
    ["train"],
    ["report"],
    ["export"],
    ["generate"],
    ["chat"],
    ["recipe", "show"],
    ["recipe", "validate"],
    ["data", "build"],
    ["data", "verify"],
    ["data", "inspect"],
    ["data", "budget"],
    ["data", "tokenizer"],
]
TINY = str(shipped_recipes() / "tiny.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lclm", *arguments], capture_output=True, text=True)


def test_help_is_instant() -> None:
    def once() -> float:
        started = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.5


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_by_example(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert f"lclm {' '.join(command)} " in result.output


def test_no_arguments_shows_help() -> None:
    assert "lclm train" in CliRunner().invoke(app, []).output


def test_recipe_show_prints_what_can_be_read_back(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipe", "show", TINY, "seed=7", "--no-parameters"])
    assert result.exit_code == 0
    file = tmp_path / "shown.yaml"
    file.write_text(result.output)
    from lclm.recipe import load_recipe

    assert load_recipe(file) == load_recipe(TINY, ["seed=7"])


def test_recipe_show_counts_parameters() -> None:
    result = CliRunner().invoke(app, ["recipe", "show", "0.6b-4b/16x"])
    assert result.exit_code == 0, result.output
    assert "4,022,468,096" in result.output and "total" in result.output


def test_recipe_validate() -> None:
    result = CliRunner().invoke(app, ["recipe", "validate", TINY])
    assert result.exit_code == 0 and result.output == f"valid: {TINY}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe", "show", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["recipe", "show", TINY, "train.log_evry=3"], "did you mean 'train.log_every'?"),
        (["train", TINY, "seed"], "not of the form key=value"),
        (["report", "nowhere"], "nowhere is no run folder"),
        (["export", "nowhere", "-o", "out"], "nowhere: there is no such folder"),
        (["generate", "nowhere"], "give one of --prompt and --questions"),
        (["generate", "nowhere", "-m", "nothing.txt", "-p", "x"], "nothing.txt"),
    ],
)
def test_errors_are_one_screen_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stopped.value.code == 2
    assert message in error and "Traceback" not in error
    assert len(error) < 2000


def test_debug_shows_the_traceback() -> None:
    done = run("recipe", "show", "nowhere.yaml", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_other_processes_print_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        main(["recipe", "show", "nowhere.yaml"])
    assert capsys.readouterr().err.startswith("[process 3] there is no file")
