"""The processor: prompts and messages to arrays, saved and loaded beside the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from lclm.model import LCLMProcessor
from lclm.model.spans import Example, collate, lay_out

FIXTURE = Path(__file__).parents[1] / "conformance" / "fixtures" / "mean-4x"
NAMES = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "latent_index",
    "encoder_input_ids",
    "encoder_position_ids",
    "encoder_window_ids",
    "block_index",
    "memory_sizes",
}
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "memory", "text": "a " * 40, "ratio": 8}, {"type": "text", "text": "why?"}],
    },
    {"role": "assistant", "content": "because"},
]


@pytest.fixture(scope="module")
def processor():
    return LCLMProcessor.from_pretrained(FIXTURE)


def test_prompts_are_padded_on_the_left_and_hold_the_models_arrays(processor):
    inputs = processor(
        text=["<|memory_start|>x<|memory_end|>?", "a longer prompt without memory"], return_tensors="pt"
    )
    assert set(inputs) == NAMES == set(processor.model_input_names)
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.int64 for value in inputs.values())
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()
    assert isinstance(processor(text="a", return_tensors="np")["input_ids"], np.ndarray)


def test_chat_template_names_ratios_and_labels(processor):
    inputs = processor.apply_chat_template(MESSAGES, return_labels=True)
    tokens = inputs["labels"][0][inputs["labels"][0] >= 0]
    assert processor.tokenizer.decode(tokens) == "because<|im_end|>"
    spans = processor.spans.conversation(MESSAGES)
    assert int(inputs["memory_sizes"][0]) == -(-len(spans[1].ids) // 8)
    batch = processor.apply_chat_template([MESSAGES, MESSAGES[:1]], add_generation_prompt=True)
    assert batch["input_ids"].shape[0] == 2
    other = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "memory", "text": "a " * 40}]}], ratio=16
    )
    assert int(other["memory_sizes"][0]) == -(-len(spans[1].ids) // 16)


def test_the_packer_makes_the_same_arrays(processor):
    spans = processor.spans.conversation(MESSAGES)
    served = processor.arrays([spans, spans], "np", padding_side="right")
    pack = lay_out([[Example(tuple(spans))]], processor._geometry)
    packed = collate([pack, pack])
    for name in NAMES - {"encoder_input_ids", "encoder_position_ids", "encoder_window_ids", "block_index"}:
        assert np.array_equal(served[name], packed[name]), name


@pytest.mark.parametrize("layout", ["native", "released"])
def test_saved_and_loaded(processor, layout, tmp_path):
    processor.save_pretrained(tmp_path, layout=layout)
    if layout == "released":
        (tmp_path / "model_config.json").write_text((FIXTURE / "model_config.json").read_text())
    again = LCLMProcessor.from_pretrained(tmp_path)
    one, other = (p.apply_chat_template(MESSAGES) for p in (processor, again))
    assert all(torch.equal(one[name], other[name]) for name in NAMES)
    if layout == "native":
        assert isinstance(AutoProcessor.from_pretrained(tmp_path), LCLMProcessor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(), "needs text"),
        (lambda p: p(text="a", images=1), "does not know 'images'"),
        (lambda p: p(text="<|memory_start|>a"), "never closed"),
        (lambda p: p(text="<|memory_start|>a<|memory_end|>", ratio=5), "ratio 5 does not divide"),
        (lambda p: p.apply_chat_template(MESSAGES, tokenize=False), "no text form"),
        (lambda p: p.save_pretrained("x", layout="flat"), "'native' or 'released'"),
        (lambda p: LCLMProcessor(p.tokenizer), "needs tokenizer, encoder_tokenizer and geometry"),
    ],
)
def test_errors(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)
