"""The metadata of a model card, as the Hub reads it. Only what is known is in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lclm.hub.facts import Facts, base_models, hub_datasets
from lclm.hub.markdown import one_line

LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-openrail-m bsd bsd-2-clause
    bsd-3-clause bsd-3-clause-clear bsl-1.0 cc cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
    eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1
    llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
    pddl postgresql unlicense unknown wtfpl zlib
    """.split()  # noqa: SIM905
)
"""The Hub's names of licences; any other is given to it as `other` with a `license_name`."""
METRICS = {
    "Reconstruction: tokens right": "accuracy",
    "Needle: digits right": "accuracy",
    "Continuation: loss saved by the compressed context": "loss_saved",
    "Continuation: share of the uncompressed context's saving": "share_recovered",
}


@dataclass
class CardOptions:
    """What the publisher says, as no file does. language: codes as ISO 639 has them. samples: how many texts
    that the model wrote to show, with the held-out documents they were written from."""

    licence: str | None = None
    base_model: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    samples: int = 0


def metadata(facts: Facts, repo: str, options: CardOptions) -> ModelCardData:
    """The card's metadata block. Only what is known is in it."""
    bases = options.base_model or base_models(facts)
    datasets = hub_datasets(facts)
    more: dict[str, Any] = {}
    if bases:
        more["base_model_relation"] = "merge" if len(bases) > 1 else "finetune"
    if options.licence and options.licence.lower() not in LICENCES:
        more["license_name"] = re.sub(r"[^\w.+-]+", "-", options.licence.lower()).strip("-")
    ratios = [f"{ratio}x" for ratio in facts.config.ratios]
    results = eval_results(facts)
    return ModelCardData(
        base_model=bases or None,
        datasets=datasets or None,
        language=options.language or None,
        library_name="transformers",
        license=licence_name(options.licence),
        pipeline_tag="text-generation",
        tags=["lclm", "latent-context", "context-compression", "long-context", *ratios],
        model_name=repo.split("/")[-1] if results else None,
        eval_results=results or None,
        **more,
    )


def licence_name(licence: str | None) -> str | None:
    if licence is None:
        return None
    return licence.lower() if licence.lower() in LICENCES else "other"


def eval_results(facts: Facts) -> list[EvalResult]:
    """What was measured of these weights, as the Hub's model-index has it."""
    held = [m for m in (facts.record.datasets if facts.record else []) if m["use"] == "held out"]
    names = list(dict.fromkeys(one_line(str(m.get("name", m["source"]))) for m in held))
    name = f"held-out {', '.join(names)}" if names else "held-out data of the run"
    found = []
    for row in facts.verdicts:
        if row.figure not in METRICS or row.value is None:
            continue
        interval = (
            {"interval_95": [round(row.low, 4), round(row.high, 4)]}
            if row.low is not None and row.high is not None
            else None
        )
        found.append(
            EvalResult(
                task_type="text-generation",
                task_name="Reading a context as latents",
                dataset_type=re.sub(r"[^\w.-]+", "-", names[0] if names else "held-out").lower(),
                dataset_name=name,
                dataset_config=f"{row.ratio}x, {row.where}",
                dataset_split="heldout",
                metric_type=METRICS[row.figure],
                metric_name=row.figure,
                metric_value=round(row.value, 4),
                metric_args=interval,
            )
        )  # fmt: skip
    return found
