from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lclm.settings import build_settings, load_settings, parse_overrides, shipped_recipes, to_plain, to_yaml


@dataclass
class Rate:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup_steps: int = 0


@dataclass
class Settings:
    name: str = "???"
    steps: int | None = None
    rate: Rate = field(default_factory=Rate)
    maybe: Rate | None = None
    parts: dict[str, Rate] = field(default_factory=dict)
    free: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_values_are_typed(tmp_path: Path) -> None:
    file = write(
        tmp_path, "a.yaml", "name: a\nrate: {lr: 3e-4}\nmaybe: {}\nfree: {x: {y: [1]}}\nparts: {e: {lr: 1}}"
    )
    settings = load_settings(Settings, file)
    assert settings == Settings(
        "a", rate=Rate(3e-4), maybe=Rate(), parts={"e": Rate(1.0)}, free={"x": {"y": [1]}}
    )


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "name: base\nsteps: 5\nrate: {lr: 1.0, warmup_steps: 3, betas: [0.5, 0.6]}")
    write(tmp_path, "other.yaml", "parts: {encoder: {lr: 2.0}, decoder: {lr: 3.0}}")
    child = (
        "extends: [../base.yaml, ../other.yaml]\nname: child\nrate: {betas: [0.1]}\nparts: {decoder: null}"
    )
    settings = load_settings(Settings, write(tmp_path, "sub/child.yaml", child))
    assert settings.name == "child" and settings.steps == 5
    assert settings.rate == Rate(1.0, [0.1], 3)
    assert settings.parts == {"encoder": Rate(2.0)}


def test_overrides_come_last(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "name: a\nmaybe: {lr: 1.0}\nparts: {e: {lr: 1.0}}")
    overrides = ["parts.e.lr=3e-4", "parts.f={lr: 5}", "maybe=null", "rate.betas=[0.1, 0.2]", "free.a.b=x"]
    settings = load_settings(Settings, file, overrides)
    assert settings.parts == {"e": Rate(3e-4), "f": Rate(5.0)}
    assert settings.maybe is None and settings.rate.betas == [0.1, 0.2] and settings.free == {"a": {"b": "x"}}


@pytest.mark.parametrize("wrong", ["novalue", "=3", "a..b=3", "a=[1"])
def test_malformed_overrides(wrong: str) -> None:
    with pytest.raises(ValueError, match="override"):
        parse_overrides([wrong])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: a", r"a.yaml: unknown key 'nmae'; did you mean 'name'\?"),
        ("name: a\nrate: {warmup: 3}", r"'rate.warmup'; did you mean 'rate.warmup_steps'\?"),
        ("name: a\nparts: {e: {bta: 3}}", r"'parts.e.bta'; did you mean 'parts.e.betas'\?"),
        ("name: a\nmaybe: {zz: 1}", r"unknown key 'maybe.zz'"),
        ("name: a\nrate: {lr: fast}", r"a.yaml: 'rate.lr'.*fast"),
        ("name: a\nrate: 3", r"'rate' must be a mapping with keys lr, betas, warmup_steps"),
        ("name: a\nparts: [1]", r"'parts' must be a mapping of names"),
        ("name: a\nparts: {e: 1}", r"'parts.e' must be a mapping"),
        ("steps: 1", r"a.yaml: 'name' has no value"),
        ("name: a\nsteps: 0", r"a.yaml: steps must be at least 1"),
        ("name: [a", r"a.yaml: is not valid YAML"),
        ("- a", r"must be a mapping"),
        ("name: a\nextends: 3", r"`extends:` must be a file name"),
        ("name: a\nextends: nowhere.yaml", r"extends 'nowhere.yaml', but there is no file"),
        ("name: a\nextends: a.yaml", r"circle"),
    ],
)
def test_errors_say_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(Settings, write(tmp_path, "a.yaml", text))


def test_an_error_names_the_file_that_has_the_key(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "naem: a")
    with pytest.raises(ValueError, match=r"base.yaml: unknown key 'naem'"):
        load_settings(Settings, write(tmp_path, "child.yaml", "extends: base.yaml\nname: b"))
    with pytest.raises(ValueError, match=r"command line: unknown key 'rate.lrr'; did you mean 'rate.lr'"):
        load_settings(Settings, write(tmp_path, "c.yaml", "name: b"), ["rate.lrr=1"])


def test_a_missing_file_names_similar_recipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tiny.yaml"):
        load_settings(Settings, "recipes/tinny.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_settings(Settings, tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        load_settings(Settings, file)


def test_plain_yaml_and_back(tmp_path: Path) -> None:
    settings = Settings("a", 3, Rate(1e-6), None, {"e": Rate()}, {"k": [1, {"z": "${not"[:1]}]})
    file = write(tmp_path, "a.yaml", to_yaml(to_plain(settings)))
    assert load_settings(Settings, file) == settings


def test_prepare_reshapes_each_layer() -> None:
    def prepare(content: dict) -> dict:
        return {("name" if key == "title" else key): value for key, value in content.items()}

    assert build_settings(Settings, [("a", {"title": "x"}), ("b", {"steps": 2})], prepare) == Settings("x", 2)


def test_shipped_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (shipped_recipes() / "tiny.yaml").is_file()
