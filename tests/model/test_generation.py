"""generate: batches, beams, samples, streams and continued caches, with the encoder run once at prefill."""

from pathlib import Path

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from lclm.model import LCLMForConditionalGeneration, LCLMProcessor

FIXTURES = Path(__file__).parents[1] / "conformance" / "fixtures"
PROMPTS = [
    "<|memory_start|>def add(a, b):\n    return a + b\n<|memory_end|> What does add do?",
    "No memory here.",
    "Both: <|memory_start|>import os\nprint(os.getcwd())<|memory_end|> and <|memory_start|>"
    + "x = 1\n" * 60
    + "<|memory_end|>?",
]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Calls:
    """Rows of every call of the encoder."""

    def __init__(self, model):
        self.rows = []
        self.handle = model.encoder.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.rows.append(
            (kwargs.get("input_ids") if "input_ids" in kwargs else kwargs["inputs_embeds"]).shape[0]
        )


@pytest.fixture(scope="module")
def released():
    folder = FIXTURES / "mean-8x-overlap8"
    return LCLMForConditionalGeneration.from_pretrained(folder), LCLMProcessor.from_pretrained(folder)


@pytest.fixture
def calls(released):
    watch = Calls(released[0])
    yield watch.rows
    watch.handle.remove()


def new(output, inputs):
    return output[:, inputs["input_ids"].shape[1] :]


def test_left_padded_batch_equals_one_by_one(released, calls):
    model, processor = released
    batch = processor(text=PROMPTS)
    assert batch["attention_mask"][1, 0] == 0
    together = new(model.generate(**batch, **GREEDY), batch)
    assert len(calls) == 1
    for row, prompt in enumerate(PROMPTS):
        alone = processor(text=prompt)
        assert torch.equal(new(model.generate(**alone, **GREEDY), alone)[0], together[row])


def test_returns_prompt_and_new_ids_and_matches_the_model_without_cache(released):
    model, processor = released
    inputs = processor(text=PROMPTS[0])
    output = model.generate(**inputs, **GREEDY)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    uncached = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(output, uncached)
    ids, index = inputs["input_ids"], inputs["latent_index"]
    for _ in range(GREEDY["max_new_tokens"]):
        arrays = {
            k: v
            for k, v in inputs.items()
            if k not in ("input_ids", "attention_mask", "position_ids", "latent_index")
        }
        logits = model(input_ids=ids, latent_index=index, **arrays).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        index = torch.nn.functional.pad(index, (0, 1), value=-1)
    assert torch.equal(output, ids)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 20},
        {"num_beams": 2, "do_sample": True},
    ],
)
def test_beams_and_several_sequences_do_not_repeat_the_encoder(released, calls, options):
    model, processor = released
    batch = processor(text=PROMPTS)
    torch.manual_seed(0)
    output = model.generate(**batch, **{**GREEDY, **options})
    assert calls == [batch["encoder_input_ids"].shape[0]]
    assert output.shape[0] == len(PROMPTS) * options.get("num_return_sequences", 1)
    if not options.get("do_sample"):
        for row, prompt in enumerate(PROMPTS):
            alone = processor(text=prompt)
            best = new(model.generate(**alone, **{**GREEDY, **options}), alone)
            many = new(output, batch).unflatten(0, (len(PROMPTS), -1))[row]
            assert torch.equal(best, many)


def test_streaming(released):
    class Pieces(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, processor = released
    inputs, streamer = processor(text=PROMPTS[2]), Pieces()
    output = model.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.ids == output[0].tolist() and streamer.ended


def test_continued_cache_encodes_new_memories_only(released, calls):
    model, processor = released
    first = processor(text=PROMPTS[2])
    turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    grown = processor(text="\nAnd <|memory_start|>class Point:\n    x = 0\n    y = 0\n<|memory_end|>?")
    text_only = processor(text="\nAnd then?")
    seen = turn.sequences
    pad = torch.nn.functional.pad
    for more in (grown, text_only):
        ids = torch.cat([seen, more["input_ids"]], 1)
        index = pad(more["latent_index"], (seen.shape[1], 0), value=-1)
        arrays = {
            name: more[name]
            for name in more
            if name.startswith("encoder") or name in ("block_index", "memory_sizes")
        }
        calls.clear()
        cache = model.generate(**first, **GREEDY, return_dict_in_generate=True).past_key_values
        calls.clear()
        continued = model.generate(
            input_ids=ids,
            latent_index=index,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            **arrays,
            **GREEDY,
        )
        assert calls == ([more["encoder_input_ids"].shape[0]] if more is grown else [])
        whole = whole_arrays(first, more, seen)
        assert torch.equal(continued, model.generate(**whole, **GREEDY))
        cache = model.generate(**first, **GREEDY, return_dict_in_generate=True).past_key_values
        calls.clear()
        again = model.generate(**whole, past_key_values=cache, **GREEDY)
        assert torch.equal(again, continued)
        assert sum(calls) <= more["encoder_input_ids"].shape[0] + 1


def whole_arrays(first, more, seen):
    """Arrays of both turns, as if they had been one prompt."""
    pad = torch.nn.functional.pad
    latents = int(first["memory_sizes"].sum())
    shift = lambda index: torch.where(index >= 0, index + latents, index)  # noqa: E731
    width = max(first["block_index"].shape[1], more["block_index"].shape[1])
    rows = {}
    for name, fill in (
        ("encoder_input_ids", 0),
        ("encoder_position_ids", 0),
        ("encoder_window_ids", -1),
        ("block_index", -1),
    ):
        new_rows = shift(more[name]) if name == "block_index" else more[name]
        rows[name] = torch.cat([pad(a, (0, width - a.shape[1]), value=fill) for a in (first[name], new_rows)])
    ids = torch.cat([seen, more["input_ids"]], 1)
    index = pad(first["latent_index"], (0, seen.shape[1] - first["latent_index"].shape[1]), value=-1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "latent_index": torch.cat([index, shift(more["latent_index"])], 1),
        "memory_sizes": torch.cat([first["memory_sizes"], more["memory_sizes"]]),
        **rows,
    }


def test_long_context_in_groups_of_rows_gives_equal_results(released, calls):
    model, processor = released
    inputs = processor(text=PROMPTS)
    whole, latents = model.generate(**inputs, **GREEDY), model.encode_memories(**inputs)
    rows = inputs["encoder_input_ids"].shape[0]
    for limit in (1, 3):
        model.config.max_rows_per_forward = limit
        calls.clear()
        try:
            assert torch.equal(model.generate(**inputs, **GREEDY), whole)
            assert max(calls) <= limit and sum(calls) == rows
            grouped = model.encode_memories(**inputs)
        finally:
            model.config.max_rows_per_forward = None
        assert all((one - other).abs().max() < 1e-5 for one, other in zip(latents, grouped, strict=True))


def test_errors_name_what_is_missing(released):
    model, processor = released
    inputs = processor(text=PROMPTS[0])
    with pytest.raises(ValueError, match="slots without latents"):
        model.generate(input_ids=inputs["input_ids"], **GREEDY)
    with pytest.raises(ValueError, match="block_index is missing"):
        model.generate(**{k: v for k, v in inputs.items() if k != "block_index"}, **GREEDY)
    with pytest.raises(ValueError, match="latent_index has the shape"):
        longer = torch.nn.functional.pad(inputs["input_ids"], (0, 1), value=5)
        model.generate(**{**inputs, "input_ids": longer}, **GREEDY)
    with pytest.raises(ValueError, match="4096"):
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 5000})
    with pytest.raises(ValueError, match="exceed the 4096"):
        model(input_ids=torch.ones(1, 4097, dtype=torch.long))
