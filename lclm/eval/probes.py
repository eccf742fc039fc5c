"""Probes: does the decoder use the latents?

Four questions on held-out text, each asked at every ratio, each answer with a 95% confidence interval:

continuation    loss of a text's next tokens given what precedes it compressed, given nothing, given another
                document's latents, given it uncompressed: the same tokens under all four, in nats per token
reconstruction  share of tokens right when the compressed text is to be repeated word for word
needle          share of digits right, and answers right whole, of numbers asked for in conversations: with
                the memory, without it, and with its text uncompressed
texts           greedily generated reconstructions and answers beside the truth, to be read by people

"Right" is the argmax with the true tokens before it (teacher forcing). An answer whose tokens are all right
in that sense is exactly the answer that greedy generation gives, so `exact` needs no generation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class ProbeSettings:
    """What the probes measure, and how much of it. Lengths are tokens of the decoder's tokenizer."""

    seed: int = 0
    ratios: list[int] | None = None  # null = every ratio the model is trained for
    context_tokens: list[int] = field(default_factory=lambda: [1024, 4096])  # continuation; [] = off
    continuation_tokens: int = 256
    reconstruct_tokens: list[int] = field(default_factory=lambda: [512])  # [] = off
    reconstruct_prompt: str | None = None  # null = the prompt of the recipe's reconstruct task
    max_needle_tokens: int = 8192  # longer conversations are left out and counted; 0 = needles off
    samples: int = 128  # of each figure, at the end of a run
    training_samples: int = 32  # of each figure, during training
    texts: int = 3  # samples of generated text of each kind and ratio; 0 = none
    batch_tokens: int = 16384  # decoder positions and encoder tokens of one forward
    aims: dict[str, dict[int, float]] = field(
        default_factory=dict
    )  # {figure: {ratio: least value}}, see AIMS

    def during_training(self) -> ProbeSettings:
        """The same probes with `training_samples` samples and at most one generated text of a kind."""
        return replace(self, samples=self.training_samples, texts=min(self.texts, 1))


AIMS = ("reconstruction", "digits", "recovered")
"""Figures that `aims` may name: reconstruction accuracy, digits right, share of the loss recovered."""


def run_probes(
    model: Any,
    processor: Any,
    documents: Sequence[str],
    conversations: Sequence[list[dict]],
    settings: ProbeSettings,
) -> dict[str, Any]:
    """Measure `model` (LCLMForConditionalGeneration, with its LCLMProcessor) on held-out `documents` (texts)
    and `conversations` (lists of messages).

    Deterministic in `settings.seed`: the same samples whatever the model, so runs and steps compare. The
    model is put in evaluation mode without gradients, and back. Every rank of a sharded model must call it
    alike.
    Returns plain data for JSON; what could not be measured is named with its reason in `absent`.
    """
    from lclm.eval.measure import measure

    started = time.perf_counter()
    result = measure(model, processor, documents, conversations, settings)
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result
