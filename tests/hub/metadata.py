"""What the Hub does not accept in a card."""

from __future__ import annotations

import re

import yaml

LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "psfl", "other", "unknown"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}


def card_errors(content: str) -> list[str]:
    """What the Hub would not accept in a card's metadata."""
    match = re.match(r"^\s*---\r?\n([\s\S]*?)\r?\n---[ \t]*(\r?\n|$)", content)
    if match is None:
        return ["no metadata block"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = []

    def every(key: str, pattern: str) -> None:
        value = data.get(key, [])
        items = value if isinstance(value, list) else [value]
        wrong = [item for item in items if not isinstance(item, str) or not re.fullmatch(pattern, item)]
        errors.extend(f"{key}: {item!r} is not valid" for item in wrong)

    every("base_model", r"[\w.-]{1,96}/[\w.-]{1,96}")
    every("datasets", r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}")
    every("language", r"[a-z]{2,3}|code|multilingual")
    every("license", "|".join(map(re.escape, LICENCES)))
    every("base_model_relation", "|".join(RELATIONS))
    every("pipeline_tag", "text-generation|image-text-to-text")
    every("library_name", r"[a-z][\w-]*")
    every("tags", r"[^\n]{1,96}")
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append("license_name: needed where license is other")
    for model in data.get("model-index") or []:
        if not isinstance(model.get("name"), str):
            errors.append("model-index: needs a name")
        for result in model.get("results") or [{}]:
            if not (result.get("task") or {}).get("type"):
                errors.append("model-index: results need task.type")
            dataset = result.get("dataset") or {}
            if not (dataset.get("type") and dataset.get("name")):
                errors.append("model-index: results need dataset.type and dataset.name")
            metrics = result.get("metrics") or [{}]
            if any(not metric.get("type") or metric.get("value") is None for metric in metrics):
                errors.append("model-index: metrics need type and value")
    return errors
