"""One function builds the model for training, resuming, export and inference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from .attention import require, resolve
from .configuration import LCLMConfig
from .layouts import assemble, released_folder, token_ids
from .modeling import LCLMForConditionalGeneration
from .processing import LCLMProcessor
from .settings import DecoderSettings, EncoderSettings, ModelSettings
from .sources import find, first_layers, load_config, load_model, load_tokenizer, why
from .text import SpanTokenizer, add_marks

COMPONENTS = ("encoder", "adapter", "decoder", "brackets")
_RENAMED = {"tie_embeddings": "tie_word_embeddings"}
_OPTIONS = [
    f.name for f in fields(ModelSettings) if f.name not in ("init_from", "encoder", "decoder", "attention")
]

__all__ = [
    "COMPONENTS",
    "DecoderSettings",
    "EncoderSettings",
    "ModelSettings",
    "build_config",
    "build_model",
    "build_processor",
    "components",
]


def build_config(settings: ModelSettings) -> LCLMConfig:
    """The configuration that a recipe's `model:` section describes, token ids included."""
    if settings.init_from:
        return _continued(
            _read("configuration", LCLMForConditionalGeneration.read_config, settings), settings
        )
    return _new_config(settings, *_tokenizers(settings))


def build_processor(settings: ModelSettings) -> LCLMProcessor:
    """The processor of the same model."""
    if settings.init_from:
        processor = _read("processor", LCLMProcessor.from_pretrained, settings)
        geometry = build_config(settings).geometry()
        return LCLMProcessor(processor.tokenizer, processor.encoder_tokenizer, geometry)
    tokenizer, encoder_tokenizer = _tokenizers(settings)
    return LCLMProcessor(
        tokenizer, encoder_tokenizer, _new_config(settings, tokenizer, encoder_tokenizer).geometry()
    )


def build_model(
    settings: ModelSettings,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> LCLMForConditionalGeneration:
    """Build the model of a recipe's `model:` section.

    device "meta": shapes only, from the configurations in the recipe, without reading weights or tokenizers
    where the recipe gives vocab_size. Fresh weights are a function of `seed`; the global random state is
    untouched.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if torch.device(device).type == "meta":
        return _on_meta(settings, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _continue(settings, dtype) if settings.init_from else _new_model(settings, dtype)
    return model.to(device)


def build_empty(
    settings: ModelSettings, *, dtype: torch.dtype = torch.float32
) -> LCLMForConditionalGeneration:
    """The model that `build_model` makes, whole but for its weights, which are on the meta device.

    Unlike `build_model` on meta it always reads the tokenizers, whose ids the forward pass needs.
    """
    config = build_config(settings)
    config._attn_implementation = require(settings.attention, config.encoder_config, config.decoder_config)
    model = _without_weights(config, dtype)
    if settings.init_from:
        released = released_folder(settings.init_from)
        _read_generation(model, str(released / "decoder" if released else settings.init_from))
        _mark_loaded(*((model.encoder, model.decoder) if released else (model,)))
        return model
    config.dtype = config.encoder_config.dtype = config.decoder_config.dtype = dtype
    model.generation_config = model.decoder.generation_config
    for part, given in ((model.encoder, settings.encoder), (model.decoder, settings.decoder)):
        source = find(given.path) if given.path is not None else None
        if source is not None and source.gguf is None and getattr(given, "layers", None) is None:
            _mark_loaded(part)
        if source is not None and source.gguf is None and part is model.decoder:
            _read_generation(model, source.name)
    _set_ends(model, settings, *_tokenizers(settings))
    return model


def _mark_loaded(*models: PreTrainedModel) -> None:
    """Mark models as transformers marks those it loaded: it sorts the names it writes of them."""
    for model in models:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [one for one in conversions if not isinstance(one, PrefixChange)]


def components(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Parameters by component, each once: encoder (with the position-in-block embedding), adapter, decoder,
    brackets. A tied parameter belongs to the decoder."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in COMPONENTS}
    seen: set[int] = set()
    named = list(model.named_parameters(remove_duplicate=False))
    for component in ("decoder", "brackets", "adapter", "encoder"):
        prefixes = (f"{component}.", "block_position.") if component == "encoder" else (f"{component}.",)
        for name, parameter in named:
            if name.startswith(prefixes) and id(parameter) not in seen:
                seen.add(id(parameter))
                found[component].append((name, parameter))
    return found


def _continue(settings: ModelSettings, dtype: torch.dtype) -> LCLMForConditionalGeneration:
    load = partial(
        LCLMForConditionalGeneration.from_pretrained,
        dtype=dtype,
        attn_implementation=require(settings.attention),
    )
    model = _read("weights", load, settings)
    require(settings.attention, model.config.encoder_config, model.config.decoder_config)
    config = _continued(copy.deepcopy(model.config), settings)
    for name in _OPTIONS:
        key = _RENAMED.get(name, name)
        setattr(model.config, key, getattr(config, key))
    return model


def _read(what: str, load: Callable[[str], Any], settings: ModelSettings) -> Any:
    path = str(settings.init_from)
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.init_from: cannot load the {what} of {path!r}: {why(path, error)}"
        ) from error


def _continued(config: LCLMConfig, settings: ModelSettings) -> LCLMConfig:
    """A checkpoint's configuration with what the recipe says differently; ValueError for what weights
    forbid."""
    if (asdict(settings.encoder), asdict(settings.decoder)) != (
        asdict(EncoderSettings()),
        asdict(DecoderSettings()),
    ):
        raise ValueError(
            f"model.init_from ({settings.init_from}) already says which encoder and decoder: leave "
            "model.encoder and model.decoder out, or leave init_from out"
        )
    before = copy.deepcopy(config)
    for name in _OPTIONS:
        value = getattr(settings, name)
        if value is not None:
            setattr(config, _RENAMED.get(name, name), value)
    if settings.ratio is not None and settings.ratios is None and settings.ratio not in config.ratios:
        config.ratios = [settings.ratio]
    if settings.ratios is not None and settings.ratio is None and config.ratio not in settings.ratios:
        config.ratio = settings.ratios[0]
    fixed = ["adapter", "adapter_layers", "tie_word_embeddings", "position_in_block"]
    if "concat" in (before.pooling, config.pooling):
        fixed += ["pooling", "ratio"]
    for name in fixed:
        if getattr(config, name) != getattr(before, name):
            raise ValueError(
                f"model.{name} is {getattr(config, name)!r}, but the weights of {settings.init_from} are for "
                f"{getattr(before, name)!r}; leave it out or start from another checkpoint"
            )
    if config.position_in_block and max(config.ratios) != max(before.ratios):
        raise ValueError(
            f"model.ratios {config.ratios}: the position-in-block embedding of {settings.init_from} ends at "
            f"{max(before.ratios)}; keep that as the largest ratio"
        )
    config.check()
    return config


def _new_model(settings: ModelSettings, dtype: torch.dtype) -> LCLMForConditionalGeneration:
    tokenizer, encoder_tokenizer = _tokenizers(settings)
    config = _new_config(settings, tokenizer, encoder_tokenizer)
    require(settings.attention, config.encoder_config, config.decoder_config)
    config.dtype = dtype
    encoder = _part(AutoModel, settings.encoder.path, config.encoder_config, settings.encoder.layers, dtype)
    decoder = _part(AutoModelForCausalLM, settings.decoder.path, config.decoder_config, None, dtype)
    needed = config.decoder_config.vocab_size
    if decoder.get_input_embeddings().weight.shape[0] < needed:
        decoder.resize_token_embeddings(needed)
    model = assemble(LCLMForConditionalGeneration, config, encoder, decoder)
    model.adapter.apply(model._init_weights)
    if settings.decoder.path is None:
        model.brackets.apply(model._init_weights)
    _start(model, fresh_encoder=settings.encoder.path is None, fresh_decoder=settings.decoder.path is None)
    _set_ends(model, settings, tokenizer, encoder_tokenizer)
    return model


def _read_generation(model: LCLMForConditionalGeneration, path: str) -> None:
    """What a checkpoint says about generation; where it says nothing, the model keeps what it has."""
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)


def _set_ends(
    model: LCLMForConditionalGeneration, settings: ModelSettings, tokenizer: Any, encoder_tokenizer: Any
) -> None:
    """Where generation ends and what it pads with, if the decoder's checkpoint does not say."""
    if settings.decoder.path is None or model.generation_config.eos_token_id is None:
        ends = SpanTokenizer(tokenizer, encoder_tokenizer).end_ids
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = model.config.pad_id


def _part(
    auto: Any, path: str | None, config: PreTrainedConfig, layers: int | None, dtype: torch.dtype
) -> Any:
    if path is not None:
        return load_model(auto, path, layers=layers, dtype=dtype, attention=config._attn_implementation)
    return auto.from_config(config, dtype=dtype)


@torch.no_grad()
def _start(model: LCLMForConditionalGeneration, *, fresh_encoder: bool, fresh_decoder: bool) -> None:
    """Starting values of what is new: an identity adapter, and places in a block.

    A trained decoder gets latents of its embeddings' scale. A fresh one gets unit latents: small ones drown
    in what its first layers add, and it takes about half again as many steps to learn to read them.
    """
    if model.config.adapter_init == "identity":
        embeddings = model.get_input_embeddings().weight
        model.adapter.start_as_identity(1.0 if fresh_decoder else float(embeddings.float().std()))
    if model.block_position is not None:
        std = model.config.encoder_config.initializer_range if fresh_encoder else 0.0
        nn.init.normal_(model.block_position.weight, std=std)


def _on_meta(settings: ModelSettings, dtype: torch.dtype) -> LCLMForConditionalGeneration:
    settings = replace(settings, attention="sdpa")  # shapes need no kernel, nor a machine that has one
    if settings.init_from:
        config = build_config(settings)
    else:
        known = [(part.config or {}).get("vocab_size") for part in (settings.encoder, settings.decoder)]
        tokenizers = (None, None) if all(known) else _tokenizers(settings)
        config = _new_config(settings, *tokenizers)
    return _without_weights(config, dtype)


def _without_weights(config: LCLMConfig, dtype: torch.dtype) -> LCLMForConditionalGeneration:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return LCLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def _tokenizers(settings: ModelSettings) -> tuple[Any, Any]:
    """(decoder's with the marks, encoder's) tokenizers."""
    path = settings.decoder.tokenizer or settings.decoder.path
    if path is None:
        raise ValueError("model.decoder needs a tokenizer: set model.decoder.tokenizer or model.decoder.path")
    tokenizer = load_tokenizer(path)
    encoder_path = settings.encoder.tokenizer or settings.encoder.path or path
    if encoder_path != path:
        encoder_tokenizer = load_tokenizer(encoder_path)
    else:
        encoder_tokenizer = tokenizer if settings.encoder.path is None else copy.deepcopy(tokenizer)
    add_marks(tokenizer)
    return tokenizer, encoder_tokenizer


def _new_config(settings: ModelSettings, tokenizer: Any | None, encoder_tokenizer: Any | None) -> LCLMConfig:
    encoder = first_layers(
        _sub_config("encoder", settings.encoder, encoder_tokenizer), settings.encoder.layers
    )
    decoder = _sub_config("decoder", settings.decoder, tokenizer)
    ids: dict[str, Any] = {} if tokenizer is None else token_ids(tokenizer, encoder_tokenizer)
    if tokenizer is not None:
        needed = _ids(tokenizer)
        if settings.decoder.path is None and decoder.vocab_size < needed:
            raise ValueError(
                f"model.decoder.config.vocab_size is {decoder.vocab_size}, but the tokenizer with its marks "
                f"has {needed} ids; leave vocab_size out to have it set"
            )
        decoder.vocab_size = max(decoder.vocab_size, needed)
        if ids["encoder_pad_id"] >= encoder.vocab_size:
            raise ValueError(
                f"the encoder tokenizer's pad token has the id {ids['encoder_pad_id']}, beyond the encoder's "
                f"{encoder.vocab_size} embeddings; give model.encoder.tokenizer the encoder's own tokenizer"
            )
    options = {
        _RENAMED.get(name, name): getattr(settings, name)
        for name in _OPTIONS
        if getattr(settings, name) is not None
    }
    options.setdefault("ratio", (settings.ratios or [16])[0])
    config = LCLMConfig(encoder_config=encoder, decoder_config=decoder, **options, **ids)
    config._attn_implementation = resolve(settings.attention)
    return config


def _sub_config(
    name: str, part: EncoderSettings | DecoderSettings, tokenizer: Any | None
) -> PreTrainedConfig:
    if part.config is None:
        if part.path is None:
            raise ValueError(f"model.{name} needs a path (weights) or a config (random weights)")
        return load_config(part.path)
    config = dict(part.config)
    model_type = config.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"model.{name}.config needs its model_type, for example qwen3")
    if tokenizer is not None:
        config.setdefault("vocab_size", _ids(tokenizer))
        config.setdefault("pad_token_id", tokenizer.pad_token_id)
        config.setdefault("eos_token_id", tokenizer.eos_token_id)
        config.setdefault("bos_token_id", tokenizer.bos_token_id)
    return AutoConfig.for_model(model_type, **config)


def _ids(tokenizer: Any) -> int:
    """Embedding rows that a tokenizer needs."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
