"""Imports run one way: from the command line down to the model, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    "lclm": {"lclm.model"},
    "lclm.__main__": {"lclm.cli", "lclm.train.ends"},
    "lclm.settings": set(),
    "lclm.model": set(),
    "lclm.data": {"lclm.settings", "lclm.model.spans", "lclm.model.text", "lclm.model.windows"},
    "lclm.checkpoint": {"lclm.model"},
    "lclm.stored": {"lclm.model"},
    "lclm.eval": {"lclm.settings", "lclm.model", "lclm.checkpoint"},
    "lclm.hub": {"lclm.settings", "lclm.model", "lclm.checkpoint", "lclm.stored", "lclm.eval"},
    "lclm.train": {
        "lclm.settings",
        "lclm.model",
        "lclm.data",
        "lclm.checkpoint",
        "lclm.stored",
        "lclm.eval.probes",
    },
    "lclm.recipe": {
        "lclm.settings",
        "lclm.model.settings",
        "lclm.data.settings",
        "lclm.train.settings",
        "lclm.eval.probes",
    },
    "lclm.ask": {"lclm.model", "lclm.checkpoint"},
    "lclm.memory": {"lclm.model", "lclm.checkpoint", "lclm.ask.documents"},
    "lclm.cli": {
        "lclm.settings",
        "lclm.recipe",
        "lclm.ask",
        "lclm.memory",
        "lclm.model",
        "lclm.checkpoint",
        "lclm.data",
        "lclm.train",
        "lclm.eval",
        "lclm.hub",
        "data_pipelines",
    },
    "data_pipelines": {"lclm.settings", "lclm.model.spans", "lclm.model.text", "lclm.data.shards"},
}


def modules() -> list[tuple[str, Path]]:
    files = [*(ROOT / "lclm").rglob("*.py"), *(ROOT / "data_pipelines").rglob("*.py")]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return [(name.removesuffix(".__init__"), file) for name, file in zip(names, files, strict=True)]


def imported(module: str, file: Path) -> Iterator[str]:
    """Every module of this project that a file imports, anywhere in it."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = ROOT.joinpath(*name.split("."), f"{alias.name}.py")
                yield f"{name}.{alias.name}" if submodule.is_file() else name


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def part_of(module: str) -> str:
    return max((part for part in ALLOWED if within(module, part)), key=len)


@pytest.mark.parametrize(("module", "file"), modules(), ids=[name for name, _ in modules()])
def test_arrows_run_one_way(module: str, file: Path) -> None:
    part = part_of(module)
    own = {"lclm": set(), "lclm.__main__": set()}.get(part, {part})
    for name in imported(module, file):
        if name == "lclm" or name.split(".")[0] not in ("lclm", "data_pipelines"):
            continue
        assert any(within(name, allowed) for allowed in ALLOWED[part] | own), (
            f"{module} must not import {name}"
        )


def test_every_module_has_a_rule() -> None:
    top = {name for name, _ in modules() if name.count(".") <= 1 and name.startswith("lclm.")}
    assert {part for part in top if part not in ALLOWED} == set()


def test_the_model_is_one_flat_folder_of_plain_imports() -> None:
    folder = ROOT / "lclm" / "model"
    assert not [p.name for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"]
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, (
                    f"{file.name}: {ast.unparse(node)}"
                )


def test_only_the_command_line_imports_the_pipelines() -> None:
    for module, file in modules():
        if not within(module, "data_pipelines") and not within(module, "lclm.cli"):
            assert not [name for name in imported(module, file) if within(name, "data_pipelines")], module


def test_spans_need_numpy_only() -> None:
    standard = {*sys.stdlib_module_names, "numpy", "__future__"}
    for module in ("spans", "windows"):
        source = ROOT / "lclm" / "model" / f"{module}.py"
        names = set(imported(f"lclm.model.{module}", source)) - {"lclm.model.spans", "lclm.model.windows"}
        assert {name.split(".")[0] for name in names} <= standard


@pytest.mark.parametrize("statement", ["import lclm", "import lclm.cli", "import lclm.settings"])
def test_light_imports_load_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nheavy = {{'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'}}\n"
    code += "print(sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_setup_cfg_lists_every_package() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split()) - {"lclm.recipes"}
    assert listed == {name for name, file in modules() if file.name == "__init__.py"}
