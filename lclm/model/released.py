"""model_config.json of the released layout: what its keys mean, and what may stand in it."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .configuration import ADAPTERS, ENCODER_ATTENTIONS, POOLINGS

SETTINGS = "model_config.json"
_log = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Key:
    """setting: its name in LCLMConfig. least: of a whole number; None: it is one of `words`. default: what a
    missing or null one means; ... when it must be there."""

    setting: str
    least: int | None = None
    words: tuple[str, ...] = ()
    default: Any = ...

    @property
    def allowed(self) -> str:
        if self.least is None:
            return f"one of {', '.join(self.words)}"
        return f"a whole number, {self.least} or more"

    def takes(self, value: Any) -> bool:
        if self.least is None:
            return value in self.words
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.least


_KEYS = {
    "compression_ratio": _Key("ratio", least=1),
    "encoder_window_size": _Key("window", least=1),
    "pooling": _Key("pooling", words=POOLINGS, default="mean"),
    "encoder_mask_type": _Key("encoder_attention", words=ENCODER_ATTENTIONS, default="causal"),
    "boundary_overlap": _Key("overlap", least=0, default=0),
    "adapter_type": _Key("adapter", words=ADAPTERS, default="mlp"),
    "num_adapter_layers": _Key("adapter_layers", least=0, default=None),
}
_NATIVE_ONLY = ("position_in_block", "tie_word_embeddings", "tie_embeddings")


def read_settings(folder: Path) -> dict[str, Any]:
    """model_config.json as LCLMConfig's settings.

    ValueError, with the file, the key, its value and what is allowed, for a key that must be there and is
    not, a value of another type or out of range, and a key by another name. A warning tells of a key that is
    missing but has a default, and of one that is unknown: authors keep versions and names there.
    """
    path = folder / SETTINGS
    raw = _read(path)
    _refuse_other_names(path, raw)
    settings = {}
    for name, key in _KEYS.items():
        value = raw.get(name)
        if value is None and key.default is ...:
            raise ValueError(f"{path} lacks {name!r}; it must be {key.allowed}")
        if value is not None and not key.takes(value):
            raise ValueError(f"{path}: {name!r} is {value!r}; it must be {key.allowed}")
        settings[key.setting] = key.default if value is None else value
    _check_together(path, settings)
    _tell(path, raw)
    if settings["adapter"] == "mlp":
        settings["adapter_layers"] = 0
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read {path}: {error}; a released checkpoint needs it as a JSON object"
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a JSON {type(raw).__name__}; a released checkpoint needs an object")
    return raw


def _refuse_other_names(path: Path, raw: dict[str, Any]) -> None:
    """What stands for a missing key of ours, or is for native checkpoints only, would change the model."""
    native = {key.setting: name for name, key in _KEYS.items()}
    for name in sorted(set(raw) - set(_KEYS)):
        meant = native.get(name) or next(iter(difflib.get_close_matches(name, _KEYS, 1, 0.85)), None)
        if meant is not None and meant not in raw:
            raise ValueError(f"{path}: {name!r} is not a key of this file; write {meant!r}")
        if name in _NATIVE_ONLY and raw[name]:
            raise ValueError(
                f"{path}: {name!r} is {raw[name]!r}, which the released layout cannot hold; take it out, or "
                "use a checkpoint in the native layout"
            )


def _check_together(path: Path, settings: dict[str, Any]) -> None:
    ratio, window = settings["ratio"], settings["window"]
    if window % ratio:
        raise ValueError(
            f"{path}: 'compression_ratio' is {ratio}, which does not divide 'encoder_window_size', {window}; "
            "the window must be a multiple of the ratio"
        )
    if settings["adapter"] != "mlp" and settings["adapter_layers"] == 0:
        raise ValueError(
            f"{path}: 'num_adapter_layers' is 0; 'adapter_type' {settings['adapter']!r} needs 1 or more"
        )


def _tell(path: Path, raw: dict[str, Any]) -> None:
    for name, key in _KEYS.items():
        if raw.get(name) is None and key.default not in (..., None):
            _log.warning_once(f"{path} does not say {name!r}; it is taken as {key.default!r}")
    for name in sorted(set(raw) - set(_KEYS)):
        _log.warning_once(
            f"{path}: {name!r} is not known and has no effect; if it changes what the model computes, its "
            "answers are not what its authors measured"
        )
