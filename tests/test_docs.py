"""README and docs tell the truth: every path, target, module, command, option and key they name exists."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from lclm.cli import app
from lclm.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("lclm", "recipes", "data_pipelines", "launch", "tests", "benchmarks", "docs", ".ci")
MADE = ("runs/", "data/", "my-model", "mine.yaml")
"""What running the commands makes, and the reader's own files."""


def pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def marked(text: str) -> list[str]:
    """What stands in backticks in running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def commands(text: str) -> list[list[str]]:
    """Words of every command line of the page: in blocks, and in backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + marked(text)
    return [line.split("#")[0].split() for line in lines if line.split("#")[0].strip()]


@pages()
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*[\w])", text))
    for name in names - {n for n in names if n.startswith(MADE)}:
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pages()
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pages()
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] == "make" or words[1:2] == ["make"]:
            named = [word for word in words[words.index("make") + 1 :] if "=" not in word]
            assert set(named) <= targets, f"{page.name}: make {' '.join(named)}"


@pages()
def test_commands_and_options_exist(page: Path) -> None:
    root = get_command(app)
    for words in commands(page.read_text(encoding="utf-8")):
        if "lclm" not in words[:1]:
            continue
        command, rest = root, words[1:]
        while rest and hasattr(command, "commands") and not rest[0].startswith(("-", "|")):
            assert rest[0] in command.commands, f"{page.name}: {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in (*command.params, *root.params) for option in parameter.opts}
        for word in rest:
            if re.fullmatch(r"--?[a-z][\w-]*", word) and word not in ("--help", "-h"):
                assert word in known, f"{page.name}: {' '.join(words)}"


@pages()
def test_modules_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:lclm|data_pipelines)(?:\.\w+)+)", text):
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            importlib.import_module(name)
    for module, names in re.findall(r"^from (lclm[\w.]*) import ([\w, ]+)$", text, flags=re.M):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip())


def recipe_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, with NAME and COMPONENT for names that the user chooses."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        for inner in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(inner):
                name = (
                    {"learn": ".COMPONENT"}.get(field.name, ".NAME")
                    if typing.get_origin(kind) is dict
                    else ""
                )
                yield key
                yield from recipe_keys(typing.cast(type, inner), f"{key}{name}.")
                break
        else:
            yield {"order": "stages.order"}.get(key, key)


def test_recipe_keys_named_in_docs_exist() -> None:
    known = set(recipe_keys(Recipe))
    sections = {field.name for field in dataclasses.fields(Recipe)}
    generic = re.compile(r"(stages|data\.sources|data\.heldout|data\.tasks)\.(?!order)\w+")
    for page in PAGES:
        for words in marked(page.read_text(encoding="utf-8")):
            key = words.split("=")[0].strip()
            if re.fullmatch(r"[a-z]\w*(\.\w+)+", key) and key.split(".")[0] in sections and " " not in key:
                named = generic.sub(r"\1.NAME", key)
                named = re.sub(r"\.learn\.\w+", ".learn.COMPONENT", named)
                assert named in known or key.endswith((".py", ".yaml", ".md")), f"{page.name} names {key}"


def test_docs_name_every_recipe_key() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for key in recipe_keys(Recipe):
        parent, _, last = key.rpartition(".")
        shared = key.replace("stages.NAME.pack.", "data.pack.")
        section = key in ("model", "data", "stages", "engine", "train", "probes")
        in_row = any(f"`{parent}`" in line and f"`{last}`" in line for line in text.splitlines())
        below = any(f"`{key}." in line for line in text.splitlines())
        assert section or f"`{shared}`" in text or below or in_row, (
            f"docs/recipes.md does not say what {key} is"
        )


def test_examples_in_docs_are_yaml_that_loads(tmp_path: Path) -> None:
    from lclm.recipe import load_recipe

    found = 0
    for page in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M):
            if block.startswith("extends:"):
                file = tmp_path / f"{found}.yaml"
                file.write_text(block)
                load_recipe(file)
                found += 1
    assert found >= 2


def test_nothing_names_a_machine() -> None:
    forbidden = re.compile(r"/(home|root|work|tmp)/\w")
    for page in PAGES:
        assert not forbidden.search(page.read_text(encoding="utf-8")), page.name
