"""Settings files: YAML that fills a dataclass, reused by `extends:`, changed by `key=value` overrides.

Knows nothing else of the project. Recipes and the pipelines of data sets are both read by `load_settings`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")
Layer = tuple[str, dict[str, Any]]
"""Where some settings come from (a file, or "command line"), and the settings."""


def load_settings(
    cls: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> T:
    """Read a YAML file into an instance of the dataclass `cls`.

    `extends:` names one file or a list of files (relative to the file that says so) that are read first.
    Mappings are merged key by key; everything else, lists included, is replaced by the later value. A named
    entry of settings (a stage, a task, a component) that is set to null is removed. `overrides` are
    `a.b.c=value` strings; values are YAML. `prepare` may reshape each file's mapping before it is compared
    with `cls`.

    Raises FileNotFoundError when there is no such file, and ValueError, naming the file and the key, for
    text that is not YAML, an unknown key (with the nearest known one), a value of the wrong type, no value.
    """
    layers = read_layers(path)
    if overrides:
        layers.append(("command line", parse_overrides(overrides)))
    return build_settings(cls, layers, prepare)


def build_settings(
    cls: type[T], layers: Sequence[Layer], prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> T:
    """An instance of `cls` from layers of plain mappings, later ones over earlier ones."""
    prepared = [(where, prepare(content) if prepare else content) for where, content in layers]
    merged: dict[str, Any] = {}
    for where, content in prepared:
        _check_keys(cls, content, where, "")
        merged = _merge(merged, content)
    files = [where for where, _ in layers if where != "command line"] or [cls.__name__]
    try:
        return typing.cast(T, OmegaConf.to_object(_typed(cls, merged)))
    except MissingMandatoryValue as error:
        message = f"{files[-1]}: '{error.full_key}' has no value; set it there or in a file it extends"
    except OmegaConfBaseException as error:
        message = _wrong_value(cls, prepared) or f"{files[-1]}: {_reason(error)}"
    except ValueError as error:
        message = str(error) if files[-1] in str(error) else f"{files[-1]}: {error}"
    raise ValueError(message)


def read_layers(path: str | Path, _inside: tuple[Path, ...] = ()) -> list[Layer]:
    """The file and everything it extends, as plain mappings, in the order in which they are merged."""
    file = find_settings_file(path)
    if file.resolve() in _inside:
        chain = " -> ".join(str(p) for p in (*_inside, file.resolve()))
        raise ValueError(
            f"{path}: files extend each other in a circle: {chain}; remove one of the `extends:`"
        )
    content = _read_yaml(file)
    parents = content.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"{path}: `extends:` must be a file name or a list of file names, not {parents!r}")
    layers: list[Layer] = []
    for parent in parents:
        try:
            layers += read_layers(find_settings_file(parent, beside=file.parent), (*_inside, file.resolve()))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: extends {parent!r}, but {error}") from None
    return [*layers, (str(path), content)]


def shipped_recipes() -> Path:
    """The folder of the recipes that come with lclm, in a checkout or in an installed wheel."""
    here = Path(__file__).resolve().parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def find_settings_file(path: str | Path, beside: Path | None = None) -> Path:
    """`path` (relative to `beside` if given) or, when there is none, the shipped recipe of that name.

    `0.6b-4b/16x`, `0.6b-4b/16x.yaml` and `recipes/0.6b-4b/16x.yaml` all name the same shipped recipe.
    Raises FileNotFoundError with the nearest names.
    """
    path = Path(path)
    found = path if beside is None else beside / path
    if found.is_file():
        return found
    name = path.relative_to("recipes") if path.parts[:1] == ("recipes",) else path
    for candidate in (name, name.with_name(name.name + ".yaml")):
        if not path.is_absolute() and (shipped_recipes() / candidate).is_file():
            return shipped_recipes() / candidate
    if found.is_dir():
        raise FileNotFoundError(f"{found} is a folder; name one of the .yaml files in it")
    known = [str(p.relative_to(shipped_recipes())) for p in shipped_recipes().rglob("*.yaml")]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; shipped recipes with a similar name: {', '.join(near)}" if near else ""
    raise FileNotFoundError(f"there is no file {found}{hint}")


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "c=[x, y]"]` as nested mappings; values are YAML, an empty value is null."""
    result: dict[str, Any] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ValueError(
                f"override {override!r} is not of the form key=value, for example train.log_every=20"
            )
        try:
            config = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"override {override!r}: the value is not YAML: {error}") from None
        result = _merge(result, typing.cast(dict, OmegaConf.to_container(config, resolve=False)))
    return result


def to_plain(settings: Any) -> Any:
    """Settings (a dataclass instance) as plain dicts, lists and scalars."""
    return OmegaConf.to_container(OmegaConf.structured(settings), resolve=True)


def to_yaml(plain: Any) -> str:
    """Plain dicts, lists and scalars as YAML that `load_settings` reads back as the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name` in spelling, or None when nothing is known."""
    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.0)
    return matches[0] if matches else None


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The text of an error about an unknown name: `unknown key 'lrr'; did you mean 'lr'? Known: ...`."""
    known = [str(k) for k in known]
    hint = f"; did you mean {nearest(name, known)!r}?" if known else ""
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known) or 'none'}"


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: is not valid YAML: {error}") from None
    except OSError as error:
        raise ValueError(f"{file}: holds no settings ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a mapping (key: value), not a {type(content).__name__}")
    return typing.cast(dict[str, Any], content)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = _merge(typing.cast(dict, under), value) if both else value
    return merged


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _bare(hint: Any) -> Any:
    """The type without `| None`; other unions are left as they are."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint


def _settings_of(hint: Any) -> type | None:
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _entry_type(hint: Any) -> type | None:
    """The dataclass X of a `dict[str, X]`, else None."""
    if typing.get_origin(hint) is dict:
        return _settings_of(_bare(typing.get_args(hint)[1]))
    return None


def _check_keys(cls: type, content: Any, where: str, prefix: str) -> None:
    """Every key of `content` is a field of `cls`, and what should be a mapping is one."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{where}: '{prefix.rstrip('.')}' must be a mapping with keys {', '.join(_hints(cls))}; "
            f"it is {content!r}"
        )
    for key, value in content.items():
        if key not in _hints(cls):
            raise ValueError(f"{where}: {_unknown_key(cls, key, prefix)}")
        hint = _bare(_hints(cls)[key])
        if value is None or (isinstance(value, str) and "${" in value):
            continue
        if (inner := _settings_of(hint)) is not None:
            _check_keys(inner, value, where, f"{prefix}{key}.")
        elif (entry := _entry_type(hint)) is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{where}: '{prefix}{key}' must be a mapping of names; it is {value!r}")
            for name, below in value.items():
                if below is not None:
                    _check_keys(entry, below, where, f"{prefix}{key}.{name}.")


def _unknown_key(cls: type, key: str, prefix: str) -> str:
    known = list(_hints(cls))
    section = f" of '{prefix[:-1]}'" if prefix else ""
    return (
        f"unknown key '{prefix}{key}'; did you mean '{prefix}{nearest(key, known)}'? "
        f"Known keys{section}: {', '.join(known)}"
    )


def _without_removed(cls: type, content: dict[str, Any]) -> dict[str, Any]:
    """`content` without the named entries that were set to null."""
    kept: dict[str, Any] = {}
    for key, value in content.items():
        hint = _bare(_hints(cls)[key])
        if isinstance(value, dict) and (inner := _settings_of(hint)) is not None:
            value = _without_removed(inner, value)
        elif isinstance(value, dict) and (entry := _entry_type(hint)) is not None:
            value = {n: _without_removed(entry, v) for n, v in value.items() if v is not None}
        kept[key] = value
    return kept


def _typed(cls: type, content: dict[str, Any]) -> Any:
    return OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(_without_removed(cls, content)))


def _wrong_value(cls: type, layers: Sequence[Layer]) -> str | None:
    """Which layer holds a value of the wrong type, and which value."""
    for where, content in layers:
        try:
            _typed(cls, content)
        except OmegaConfBaseException as error:
            return f"{where}: {_reason(error)}"
    return None


def _reason(error: OmegaConfBaseException) -> str:
    place = f"'{error.full_key}': " if error.full_key else ""
    return place + str(error.msg or error).split("\n")[0].strip()
