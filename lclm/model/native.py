"""The native layout: one transformers checkpoint that carries the code which loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.dynamic_module_utils import custom_object_save

from .configuration import LCLMConfig
from .pipeline import custom_pipelines

if TYPE_CHECKING:
    from .modeling import LCLMForConditionalGeneration

AUTO_MAP = {
    "AutoConfig": "configuration.LCLMConfig",
    "AutoModel": "modeling.LCLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling.LCLMForConditionalGeneration",
}


def complete(config: LCLMConfig, fingerprints: Mapping[str, str]) -> None:
    """Put into a configuration what config.json says beside the model's settings: the classes that load the
    checkpoint, its pipeline, and the fingerprint of each component's weights. Where on this machine its parts
    came from is left out."""
    settings: Any = config
    for part in (settings.encoder_config, settings.decoder_config):
        if Path(part._name_or_path).exists() or Path(part._name_or_path).is_absolute():
            part._name_or_path = ""
    settings.auto_map = dict(AUTO_MAP)
    settings.custom_pipelines = custom_pipelines()
    settings.fingerprints = dict(fingerprints)


def save_without_weights(
    model: LCLMForConditionalGeneration, folder: Any, fingerprints: Mapping[str, str]
) -> None:
    """All that `save_pretrained` writes but the weights, for a writer that streams these into `folder`.

    fingerprints: of the weights that it writes, see `Fingerprint`. The model may be on the meta device.
    """
    config: Any = model.config
    complete(config, fingerprints)
    config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
