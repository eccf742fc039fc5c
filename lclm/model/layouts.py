"""The released layout: decoder/, encoder/, adapter/adapter.safetensors and model_config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, logging

from .attention import resolve
from .configuration import LCLMConfig
from .released import SETTINGS, read_settings
from .text import mark_ids

if TYPE_CHECKING:
    from .modeling import LCLMForConditionalGeneration

ADAPTER = "adapter/adapter.safetensors"
MARKS = "adapter/marks.safetensors"
"""The decoder's own embeddings of the memory marks, where the brackets that took their rows are others. Only
we read it; without it such a model would come back with another decoder."""
PARTS = ("encoder", "adapter", "decoder")
_WEIGHTS = ("safetensors", "bin", "pt", "pth")
_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")
_LOAD = ("dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "quantization_config")
_log = logging.get_logger(__name__)


def released_folder(name_or_path: Any, weights: Sequence[str] = PARTS, **kwargs: Any) -> Path | None:
    """Local folder of a checkpoint in the released layout, fetched from the Hub if need be; None for a
    native one. weights: the parts whose weights are wanted, those of others are not fetched."""
    if name_or_path is None:
        return None
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder if (folder / SETTINGS).is_file() and not (folder / "config.json").is_file() else None
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(str(name_or_path), "config.json", **hub, **quiet) is not None:
        return None
    if cached_file(str(name_or_path), SETTINGS, **hub, **quiet) is None:
        return None
    from huggingface_hub import snapshot_download

    hub.pop("proxies", None)
    unwanted = [f"{part}/*.{end}" for part in PARTS if part not in weights for end in _WEIGHTS]
    return Path(snapshot_download(str(name_or_path), ignore_patterns=unwanted, **hub))


def released_config(folder: Path) -> LCLMConfig:
    """LCLMConfig of a checkpoint in the released layout."""
    settings = read_settings(folder)
    decoder_tokenizer, encoder_tokenizer = released_tokenizers(folder)
    ids: dict[str, Any] = token_ids(decoder_tokenizer, encoder_tokenizer)
    return LCLMConfig(
        encoder_config=AutoConfig.from_pretrained(folder / "encoder"),
        decoder_config=AutoConfig.from_pretrained(folder / "decoder"),
        adapter_hidden=_adapter_hidden(folder),
        **settings,
        **ids,
    )


def released_tokenizers(folder: Path) -> tuple[Any, Any]:
    """(decoder's, encoder's) tokenizers."""
    return AutoTokenizer.from_pretrained(folder / "decoder"), AutoTokenizer.from_pretrained(
        folder / "encoder"
    )


def token_ids(tokenizer: Any, encoder_tokenizer: Any) -> dict[str, int]:
    """The ids that a geometry needs, from the two tokenizers."""
    start, end, memory = mark_ids(tokenizer)
    encoder_pad = _pad_id(encoder_tokenizer)
    return {
        "memory_start_id": start,
        "memory_id": memory,
        "memory_end_id": end,
        "pad_id": _pad_id(tokenizer),
        "encoder_pad_id": encoder_pad,
        "encoder_marker_id": encoder_pad,
    }


def _pad_id(tokenizer: Any) -> int:
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise ValueError("the tokenizer has neither a pad nor an end-of-sequence token; set tokenizer.pad_token")


def _adapter_hidden(folder: Path) -> int:
    """The width inside the adapter's MLP, from the header of its file."""
    path = folder / ADAPTER
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.get_slice("fc1.weight").get_shape()[0])
    except Exception as error:
        raise ValueError(f"cannot read the adapter {path}: {error}") from error


def from_released(
    cls: Any, folder: Path, *args: Any, encoder: bool = True, **kwargs: Any
) -> LCLMForConditionalGeneration:
    """Build a model from the released layout, without encoder and adapter if encoder is False. kwargs: dtype,
    attn_implementation, device_map as in transformers."""
    load = {name: kwargs[name] for name in _LOAD if name in kwargs}
    if "torch_dtype" in kwargs:
        load.setdefault("dtype", kwargs["torch_dtype"])
    load.setdefault("attn_implementation", resolve("auto"))
    config = kwargs.get("config") or released_config(folder)
    read = AutoModel.from_pretrained(folder / "encoder", **load) if encoder else None
    decoder = AutoModelForCausalLM.from_pretrained(folder / "decoder", **load)
    model = assemble(cls, config, read, decoder)
    if (rows := read_marks(folder)) is not None:
        table = decoder.get_input_embeddings().weight.data
        table[list(model.brackets.ids)] = rows.to(table)
    model.name_or_path = str(folder)
    if encoder:
        _read_adapter(model, folder)
    return model.eval()


def _read_adapter(model: LCLMForConditionalGeneration, folder: Path) -> None:
    try:
        model.adapter.load_state_dict(load_file(folder / ADAPTER))
    except RuntimeError as error:
        raise ValueError(
            f"the adapter {folder / ADAPTER} does not fit {folder / SETTINGS}: {error}"
        ) from error


def assemble(cls: Any, config: LCLMConfig, encoder: Any | None, decoder: Any) -> LCLMForConditionalGeneration:
    """A model around a loaded encoder (None: without one) and decoder; the brackets start as the decoder's
    embeddings of the marks."""
    config.decoder_config = decoder.config
    config._attn_implementation_internal = decoder.config._attn_implementation
    if encoder is not None:
        config.encoder_config = encoder.config
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
    with torch.device("meta"):
        model = cls(config, encoder=encoder is not None)
    table = decoder.get_input_embeddings().weight
    for part in (model.adapter, model.brackets, model.block_position):
        if part is not None:
            part.to_empty(device=table.device).to(table.dtype)
    model.encoder, model.decoder = encoder, decoder
    model.config.dtype = table.dtype
    with torch.no_grad():
        model.brackets.weight.copy_(table[list(model.brackets.ids)])
    model.generation_config = decoder.generation_config
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def save_released(
    model: LCLMForConditionalGeneration,
    save_directory: Any,
    *,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write the three-folder layout; the brackets become rows of the decoder's embeddings.

    state_dict: the model's weights if they are not in it (gathered from a sharded engine). The tokenizers are
    written by the processor. ValueError for what the layout cannot hold.
    """
    settings = released_settings(model.config)
    folder = Path(save_directory)
    weights = model.state_dict() if state_dict is None else state_dict
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "adapter": {}, "brackets": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = value
    own = _write_brackets(model, parts)
    model.decoder.generation_config = model.generation_config
    model.encoder.save_pretrained(folder / "encoder", state_dict=parts["encoder"], **kwargs)
    model.decoder.save_pretrained(folder / "decoder", state_dict=parts["decoder"], **kwargs)
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in parts["adapter"].items()}, folder / ADAPTER)
    write_marks(folder, own, parts["brackets"]["weight"])
    write_settings(folder, settings)


def released_settings(config: LCLMConfig) -> dict[str, Any]:
    """What model_config.json says; ValueError for a model that the layout cannot hold."""
    if config.tie_word_embeddings:
        raise ValueError(
            "the released layout cannot hold embeddings shared between encoder and decoder (tie_embeddings); "
            "save with layout='native'"
        )
    if config.position_in_block:
        raise ValueError("the released layout has no place for position_in_block; save with layout='native'")
    if len(config.ratios) > 1:
        _log.warning(
            f"the released layout holds one ratio, {config.ratio}, of those the model is for: {config.ratios}"
        )
    settings = {
        "compression_ratio": config.ratio,
        "encoder_window_size": config.window,
        "pooling": config.pooling,
        "encoder_mask_type": config.encoder_attention,
        "boundary_overlap": config.overlap,
        "adapter_type": config.adapter,
    }
    if config.adapter_layers:
        settings["num_adapter_layers"] = config.adapter_layers
    return settings


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Make `folder` a checkpoint in the released layout: model_config.json, and no config.json."""
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").unlink(missing_ok=True)


def write_marks(folder: Path, own: Tensor, brackets: Tensor) -> None:
    """Keep the decoder's own embeddings of the marks [2, K] if the brackets in their rows are others."""
    (folder / MARKS).unlink(missing_ok=True)
    if not torch.equal(own, brackets.to(own)):
        save_file({"rows": own.contiguous()}, folder / MARKS)


def read_marks(folder: Path) -> Tensor | None:
    """The decoder's own embeddings of the marks; None where the brackets are these."""
    path = folder / MARKS
    return load_file(path)["rows"] if path.is_file() else None


def _write_brackets(model: LCLMForConditionalGeneration, parts: dict[str, dict[str, Tensor]]) -> Tensor:
    """Put the brackets into (a copy of) the decoder's embedding table, wherever it appears. Returns the rows
    that were there."""
    decoder = model.decoder
    table = decoder.get_input_embeddings().weight
    names = [name for name, value in decoder.named_parameters(remove_duplicate=False) if value is table]
    present = [name for name in names if name in parts["decoder"]]
    written = parts["decoder"][present[0]].clone()
    rows = list(model.brackets.ids)
    own = written[rows]
    written[rows] = parts["brackets"]["weight"].to(written)
    for name in present:
        parts["decoder"][name] = written
    return own
