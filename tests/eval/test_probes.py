from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lclm.eval.cases import find_needles, others, sample_passages
from lclm.eval.probes import ProbeSettings, run_probes
from lclm.eval.scoring import score
from lclm.eval.verdict import verdicts
from lclm.model.spans import Example, Span

sys.path.insert(0, str(Path(__file__).parent))
from tiny_model import conversations, documents, make

SETTINGS = ProbeSettings(
    context_tokens=[32, 64],
    continuation_tokens=16,
    reconstruct_tokens=[32],
    reconstruct_prompt="Repeat:",
    max_needle_tokens=400,
    samples=12,
    texts=2,
    batch_tokens=2048,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def result(tiny):
    return run_probes(*tiny, documents(8), conversations(6), SETTINGS)


def test_every_figure_at_every_ratio(result):
    assert [(row["ratio"], row["context_tokens"]) for row in result["continuation"]] == [
        (4, 32), (8, 32), (4, 64), (8, 64),
    ]  # fmt: skip
    for row in result["continuation"]:
        assert set(row["loss"]) == {"compressed", "none", "shuffled", "uncompressed"}
        assert row["samples"] == 12 and row["documents"] == 8 and row["next_tokens"] == 15
        assert row["loss"]["none"]["mean"] == pytest.approx(np.log(268), abs=2)
        assert row["saved"]["compressed"]["mean"] == pytest.approx(
            row["loss"]["none"]["mean"] - row["loss"]["compressed"]["mean"]
        )
    assert [row["ratio"] for row in result["reconstruction"]] == [4, 8]
    assert all(row["accuracy"]["compressed"]["mean"] < 0.3 for row in result["reconstruction"])
    assert [(row["ratio"], row["numbers"], row["samples"]) for row in result["needle"]] == [
        (4, "one", 6), (8, "one", 6),
    ]  # fmt: skip
    assert [(text["kind"], text["ratio"]) for text in result["texts"]] == [
        ("reconstruction", 4), ("reconstruction", 4), ("reconstruction", 8), ("reconstruction", 8),
        ("answer", 4), ("answer", 4), ("answer", 8), ("answer", 8),
    ]  # fmt: skip
    assert not result["absent"]
    assert len(verdicts(json.loads(json.dumps(result)))) == 2 * (1 + 1 + 2 * 3)


def test_the_same_again_and_the_model_is_left_as_it_was(tiny, result):
    model, processor = tiny
    model.train()
    model.adapter.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    again = run_probes(model, processor, documents(8), conversations(6), SETTINGS)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert model.training and model.encoder.training and not model.adapter.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_seed_takes_other_samples(tiny, result):
    other = run_probes(*tiny, documents(8), conversations(6), replace(SETTINGS, seed=1))
    assert other["continuation"][0]["loss"] != result["continuation"][0]["loss"]


def test_scores_do_not_depend_on_the_batch(tiny):
    model, _ = tiny
    geometry = model.config.geometry()
    rng = np.random.default_rng(0)
    examples = [
        Example(
            (
                Span("memory", rng.integers(0, 250, size), ratio=ratio),
                Span("text", rng.integers(0, 250, 5)),
                Span("text", rng.integers(0, 250, 9), loss=True),
            )
        )
        for size, ratio in ((7, 4), (70, 8), (33, 4), (64, 8))
    ] + [Example((Span("text", rng.integers(0, 250, 12), loss=True),))]
    with torch.no_grad():
        model.eval()
        together = score(model, examples, geometry, 4096)
        for example, found in zip(examples, together, strict=True):
            alone = score(model, [example], geometry, 1)[0]
            np.testing.assert_allclose(found.losses, alone.losses, atol=1e-5)
            np.testing.assert_array_equal(found.hits, alone.hits)
    assert [len(found.losses) for found in together] == [9, 9, 9, 9, 11]


def test_scores_are_those_of_the_models_own_loss(tiny):
    from lclm.eval.scoring import tensors
    from lclm.model.spans import lay_out

    model, _ = tiny
    rng = np.random.default_rng(1)
    example = Example(
        (Span("memory", rng.integers(0, 250, 40)), Span("text", rng.integers(0, 250, 20), loss=True))
    )
    model.eval()
    with torch.no_grad():
        arrays = lay_out([[example]], model.config.geometry())
        expected = model(**tensors(arrays, model.device)).token_losses.numpy()
        found = score(model, [example], model.config.geometry(), 10_000)[0]
    np.testing.assert_allclose(found.losses, expected, atol=1e-5)


def test_passages_are_cut_at_characters_and_follow_each_other(tiny):
    content = tiny[1].spans.content
    texts = documents(5, seed=3)
    passages = sample_passages(texts, content, 32, 16, 20, np.random.default_rng(0))
    assert len(passages) == 20 and {p.document for p in passages} == set(range(5))
    for passage in passages:
        assert len(passage.context_ids) == 32 and len(passage.next_ids) == 16
        assert content.decode(passage.context_ids) == passage.context
        following = content.decode(passage.next_ids)
        assert passage.context + following in texts[passage.document]
    partners = others(passages)
    assert all(passages[i].document != passages[j].document for i, j in enumerate(partners))


def test_needles_are_numbers_that_stand_in_the_memory():
    def ask(memory: str, answer: str) -> list[dict]:
        parts = [{"type": "memory", "text": memory, "ratio": 8}, {"type": "text", "text": "Which?"}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]

    found = find_needles(
        [
            ask("a 12345 b", "12345"),
            ask("a 12345 b 54321", "12345"),
            ask("a 123456 b", "12345"),
            ask("its docstring", "Read a file."),
            [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "12"}],
        ]
    )
    assert [(needle.answer, needle.numbers) for needle in found] == [("12345", 1), ("12345", 2)]
    needle = found[0]
    assert needle.question() == "Which?" and needle.memory() == "a 12345 b"
    assert needle.with_memory("none")[0]["content"] == [{"type": "text", "text": "Which?"}]
    kinds = [part["type"] for part in needle.with_memory("uncompressed")[0]["content"]]
    assert kinds == ["text", "text"]
    assert needle.with_memory("compressed")[0]["content"][0] == {"type": "memory", "text": "a 12345 b"}


def test_what_cannot_be_measured_is_said(tiny):
    few = run_probes(
        *tiny, ["short"], [], replace(SETTINGS, reconstruct_prompt=None, context_tokens=[32, 4096])
    )
    assert not few["continuation"] and not few["needle"] and not few["texts"]
    absent = few["absent"]
    assert "none of the 1 held-out documents" in absent["continuation, 32 tokens"]
    assert "only 512 positions" in absent["continuation, 4096 tokens"]
    assert "reconstruct_prompt" in absent["reconstruction"] and "number" in absent["needle"]


def test_one_document_has_no_other_latents(tiny):
    one = run_probes(*tiny, documents(1), [], replace(SETTINGS, max_needle_tokens=0, texts=0))
    assert all("shuffled" not in row["loss"] for row in one["continuation"])
    assert "another document's latents, 32 tokens" in one["absent"]
    assert verdicts(one)


def test_long_conversations_are_left_out_and_counted(tiny):
    found = run_probes(*tiny, [], conversations(6), replace(SETTINGS, max_needle_tokens=20, texts=0))
    assert not found["needle"] and "6 conversations exceed 20 tokens" in str(found["absent"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"samples": 0}, "probes.samples"),
        ({"continuation_tokens": 1}, "continuation_tokens"),
        ({"reconstruct_tokens": [0]}, "positive"),
        ({"aims": {"reconstructoin": {4: 0.5}}}, "reconstructoin"),
    ],
)
def test_settings_that_cannot_work(tiny, change, match):
    with pytest.raises(ValueError, match=match):
        run_probes(*tiny, [], [], replace(SETTINGS, **change))


def test_during_training_less_is_measured():
    small = replace(SETTINGS, samples=200, training_samples=10, texts=5).during_training()
    assert small.samples == 10 and small.texts == 1
