"""The probes themselves: cases, scores, figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lclm.eval.cases import (
    Needle,
    Passage,
    continuation,
    find_needles,
    others,
    reconstruction,
    sample_passages,
)
from lclm.eval.probes import AIMS, ProbeSettings
from lclm.eval.scoring import evaluating, generate, score
from lclm.eval.statistics import Bootstrap
from lclm.model.spans import Example, Geometry, Span
from lclm.model.text import SpanTokenizer

SHOWN = 600  # characters of a context shown beside a sample


def measure(
    model: Any,
    processor: Any,
    documents: Sequence[str],
    conversations: Sequence[list[dict]],
    settings: ProbeSettings,
) -> dict[str, Any]:
    """What `run_probes` returns, less its time."""
    check(settings)
    probes = _Probes(model, processor, settings)
    with evaluating(model):
        for length in settings.context_tokens:
            probes.continuation(documents, length)
        for length in settings.reconstruct_tokens:
            probes.reconstruction(documents, length)
        if settings.max_needle_tokens:
            probes.needles(conversations)
    return probes.result


def check(settings: ProbeSettings) -> None:
    """ValueError for settings that no probe can work with."""
    for name in ("samples", "training_samples", "batch_tokens"):
        if getattr(settings, name) < 1:
            raise ValueError(f"probes.{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.context_tokens and settings.continuation_tokens < 2:
        raise ValueError(
            "probes.continuation_tokens must be at least 2: the first token after a context is not scored"
        )
    if min([*settings.context_tokens, *settings.reconstruct_tokens], default=1) < 1:
        raise ValueError("probes.context_tokens and probes.reconstruct_tokens must be positive lengths")
    for name in settings.aims:
        if name not in AIMS:
            raise ValueError(f"probes.aims names {name!r}; the figures with aims are {', '.join(AIMS)}")


class _Probes:
    """One run of the probes: the model, what it is asked, and the result as it grows."""

    def __init__(self, model: Any, processor: Any, settings: ProbeSettings) -> None:
        self.model = model
        self.settings = settings
        self.spans: SpanTokenizer = processor.spans
        self.geometry: Geometry = model.config.geometry()
        self.ratios = sorted(settings.ratios or model.config.ratios or [self.geometry.ratio])
        self.limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.result: dict[str, Any] = {
            "schema": 1, "seed": settings.seed, "ratios": self.ratios, "aims": settings.aims,
            "continuation": [], "reconstruction": [], "needle": [], "texts": [], "absent": {},
        }  # fmt: skip

    def _score(self, examples: Sequence[Example]) -> list:
        return score(self.model, examples, self.geometry, self.settings.batch_tokens)

    def _passages(self, probe: str, documents: Sequence[str], length: int, following: int) -> list[Passage]:
        """Passages for a probe; when there are none, says why in `absent`."""
        name = f"{probe}, {length} tokens"
        if self.limit and length + following + 64 > self.limit:
            self.result["absent"][name] = f"the decoder has only {self.limit} positions"
            return []
        rng = np.random.default_rng([self.settings.seed, length, following])
        found = sample_passages(documents, self.spans.content, length, following, self.settings.samples, rng)
        if not found:
            self.result["absent"][name] = (
                f"none of the {len(documents)} held-out documents has {length + following} tokens"
            )
        return found

    def _bootstrap(self, passages: list[Passage]) -> Bootstrap:
        return Bootstrap(len(passages), self.settings.seed, [passage.document for passage in passages])

    def _memories(self, passages: Sequence[Passage], ratio: int) -> list[Span]:
        return [self.spans.memory(passage.context, ratio) for passage in passages]

    def continuation(self, documents: Sequence[str], length: int) -> None:
        """The four losses at every ratio, for contexts of `length` tokens."""
        following = self.settings.continuation_tokens
        passages = self._passages("continuation", documents, length, following)
        if not passages:
            return
        partners = others(passages)
        if partners is None:
            self.result["absent"][f"another document's latents, {length} tokens"] = (
                "all passages are of one document"
            )

        def losses(examples: list[Example]) -> np.ndarray:
            return np.array([one.losses[1 - following :].mean() for one in self._score(examples)], np.float64)

        shared = {
            "none": losses([continuation(None, None, passage) for passage in passages]),
            "uncompressed": losses(
                [continuation(None, passage.context_ids, passage) for passage in passages]
            ),
        }
        for ratio in self.ratios:
            memories = self._memories(passages, ratio)
            ways = dict(shared)
            pairs = zip(memories, passages, strict=True)
            ways["compressed"] = losses([continuation(memory, None, passage) for memory, passage in pairs])
            if partners is not None:
                swapped = zip((memories[j] for j in partners), passages, strict=True)
                ways["shuffled"] = losses(
                    [continuation(memory, None, passage) for memory, passage in swapped]
                )
            sizes = {"ratio": ratio, "context_tokens": length, "next_tokens": following - 1}
            self.result["continuation"].append(
                {**sizes, **self._continuation_figures(ways, passages), **_counts(passages)}
            )

    def _continuation_figures(self, ways: dict[str, np.ndarray], passages: list[Passage]) -> dict[str, Any]:
        interval = self._bootstrap(passages)
        saved = {way: ways["none"] - loss for way, loss in ways.items() if way != "none"}
        figures: dict[str, Any] = {
            "loss": {way: interval.mean(loss) for way, loss in ways.items()},
            "saved": {way: interval.mean(value) for way, value in saved.items()},
            "recovered": {
                way: interval.share(value, saved["uncompressed"])
                for way, value in saved.items()
                if way != "uncompressed"
            },
        }
        if "shuffled" in ways:
            figures["own"] = interval.mean(ways["shuffled"] - ways["compressed"])
        return figures

    def reconstruction(self, documents: Sequence[str], length: int) -> None:
        """Share of tokens right at every ratio, for texts of `length` tokens; and texts to read."""
        prompt_text = self.settings.reconstruct_prompt
        if prompt_text is None:
            self.result["absent"]["reconstruction"] = "no prompt: set probes.reconstruct_prompt"
            return
        passages = self._passages("reconstruction", documents, length, 0)
        if not passages:
            return
        prompt = [self.spans.text(prompt_text)] if prompt_text else []
        partners = others(passages)
        interval = self._bootstrap(passages)
        for ratio in self.ratios:
            memories = self._memories(passages, ratio)
            scores = self._score(
                [reconstruction(m, prompt, p) for m, p in zip(memories, passages, strict=True)]
            )
            shares = np.array([one.hits.mean() for one in scores])
            row: dict[str, Any] = {
                "ratio": ratio, "context_tokens": length,
                "accuracy": {"compressed": interval.proportion(shares)},
                "exact": interval.proportion(np.array([one.hits.all() for one in scores])),
                "loss": interval.mean(np.array([one.losses.mean() for one in scores])), **_counts(passages),
            }  # fmt: skip
            if partners is not None:
                pairs = zip((memories[j] for j in partners), passages, strict=True)
                swapped = np.array(
                    [one.hits.mean() for one in self._score([reconstruction(m, prompt, p) for m, p in pairs])]
                )
                row["accuracy"]["shuffled"] = interval.proportion(swapped)
                row["gain"] = interval.mean(shares - swapped)
            self.result["reconstruction"].append(row)
            self._reconstructed_texts(passages, memories, prompt, ratio, length)

    def _reconstructed_texts(
        self, passages: list[Passage], memories: list[Span], prompt: list[Span], ratio: int, length: int
    ) -> None:
        shown = min(self.settings.texts, len(passages))
        written = self._generate([Example((memory, *prompt)) for memory in memories[:shown]], length)
        for passage, text in zip(passages[:shown], written, strict=True):
            truth = self.spans.content.decode(passage.context_ids)
            self.result["texts"].append(
                {"kind": "reconstruction", "ratio": ratio, "truth": truth, "written": text}
            )

    def _generate(self, examples: list[Example], tokens: int) -> list[str]:
        eos = self.model.generation_config.eos_token_id
        end = [self.spans.end_of_text_id, self.spans.tokenizer.eos_token_id]
        end = [number for number in end + (eos if isinstance(eos, list) else [eos]) if number is not None]
        return [
            self.spans.content.decode(ids)
            for ids in generate(self.model, examples, self.geometry, tokens, end)
        ]

    def needles(self, conversations: Sequence[list[dict]]) -> None:
        """Digits right at every ratio: with the memory, without it, with its text uncompressed."""
        found = find_needles(conversations)
        if not found:
            self.result["absent"]["needle"] = (
                f"none of the {len(conversations)} held-out conversations asks for a number in its memory"
            )
            return
        rng = np.random.default_rng([self.settings.seed, 2])
        found = [found[index] for index in rng.permutation(len(found))]
        for numbers in ("one", "several"):
            group = [needle for needle in found if (needle.numbers == 1) == (numbers == "one")]
            self._needle_group(numbers, group)

    def _needle_group(self, numbers: str, group: list[Needle]) -> None:
        chosen: list[Needle] = []
        skipped = 0
        most = min(self.settings.max_needle_tokens, self.limit or self.settings.max_needle_tokens)
        full = []
        for needle in group:
            if len(chosen) == self.settings.samples:
                break
            example = self._asked(needle, "uncompressed", None)
            if self.geometry.size(example).positions > most:
                skipped += 1
                continue
            chosen.append(needle)
            full.append(example)
        if skipped:
            self.result["absent"][f"needles, {numbers} number"] = (
                f"{skipped} conversations exceed {most} tokens"
            )
        if not chosen:
            return
        interval = Bootstrap(len(chosen), self.settings.seed)
        shared = {
            "none": self._right(chosen, [self._asked(needle, "none", None) for needle in chosen]),
            "uncompressed": self._right(chosen, full),
        }
        for ratio in self.ratios:
            ways = dict(shared)
            ways["compressed"] = self._right(
                chosen, [self._asked(needle, "compressed", ratio) for needle in chosen]
            )
            digits = {way: np.array([hits.mean() for hits in right]) for way, right in ways.items()}
            exact = {way: np.array([hits.all() for hits in right]) for way, right in ways.items()}
            self.result["needle"].append(
                {
                    "ratio": ratio, "numbers": numbers, "samples": len(chosen),
                    "digits": {way: interval.proportion(value) for way, value in digits.items()},
                    "exact": {way: interval.proportion(value) for way, value in exact.items()},
                    "gain": interval.mean(digits["compressed"] - digits["none"]),
                }
            )  # fmt: skip
            self._answers(chosen, ratio)

    def _asked(self, needle: Needle, kind: str, ratio: int | None) -> Example:
        messages = [*needle.with_memory(kind), {"role": "assistant", "content": needle.answer}]
        return Example(tuple(self.spans.conversation(messages, ratio=ratio)))

    def _right(self, needles: list[Needle], examples: list[Example]) -> list[np.ndarray]:
        """Of each answer's tokens (a digit each, in tokenizers that part digits), which are right."""
        sizes = [len(self.spans.content.encode(needle.answer)) for needle in needles]
        return [one.hits[:size] for one, size in zip(self._score(examples), sizes, strict=True)]

    def _answers(self, needles: list[Needle], ratio: int) -> None:
        shown = needles[: self.settings.texts]
        asked = [
            Example(tuple(self.spans.conversation(needle.with_memory("compressed"), True, ratio)))
            for needle in shown
        ]
        longest = max((len(self.spans.content.encode(needle.answer)) for needle in shown), default=0) + 4
        for needle, text in zip(shown, self._generate(asked, longest), strict=True):
            self.result["texts"].append(
                {
                    "kind": "answer", "ratio": ratio, "truth": needle.answer, "written": text,
                    "context": needle.memory()[:SHOWN], "question": needle.question(),
                }
            )  # fmt: skip


def _counts(passages: Sequence[Passage]) -> dict[str, int]:
    return {"samples": len(passages), "documents": len({passage.document for passage in passages})}
