"""The released layout means what the reference implementation says: ids, latents, logits and greedy
tokens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lclm.model import LCLMForConditionalGeneration, LCLMProcessor

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
TOLERANCE = 1e-4


def check(checkpoint, golden):
    model = LCLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = LCLMProcessor.from_pretrained(checkpoint)
    cases = json.loads((golden / "golden.json").read_text())
    tensors = load_file(golden / "golden.safetensors")
    for number, case in enumerate(cases):
        inputs = processor(text=case["formatted"], return_tensors="pt")
        assert torch.equal(inputs["input_ids"][0], tensors[f"{number}.input_ids"])
        slots = inputs["latent_index"][0] >= 0
        for start, stop in case["memory_positions"]:
            assert slots[start:stop].all() and not slots[start - 1] and not slots[stop]
        latents = model.encode_memories(**inputs)
        assert [len(memory) for memory in latents] == case["latent_counts"]
        for place, memory in enumerate(latents):
            assert (memory - tensors[f"{number}.latents.{place}"]).abs().max() < TOLERANCE
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        assert (logits - tensors[f"{number}.logits"]).abs().max() < TOLERANCE
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert torch.equal(generated[0, -12:], tensors[f"{number}.generated_ids"])
    return model, processor


@pytest.mark.parametrize("case", CASES)
def test_reference_and_round_trips(case, tmp_path):
    """released -> native -> released -> native: weights bit for bit, and what the golden files say."""
    golden = FIXTURES / case
    model, processor = check(golden, golden)
    for step, layout in enumerate(("native", "released", "native")):
        folder = tmp_path / f"{step}-{layout}"
        model.save_pretrained(folder, layout=layout)
        processor.save_pretrained(folder, layout=layout)
        before, (model, processor) = model, check(folder, golden)
        assert model.config.geometry() == before.config.geometry()
        assert processor.chat_template == AutoTokenizer.from_pretrained(golden / "decoder").chat_template
    assert weights(tmp_path / "2-native") == weights(tmp_path / "0-native")
    assert weights(tmp_path / "1-released") == weights(golden)
    assert settings(tmp_path / "1-released") == settings(golden)


def settings(folder):
    return json.loads((folder / "model_config.json").read_text())


def weights(folder):
    """{file: {tensor: what its bytes are}} of a checkpoint's weights."""
    files = [path for path in folder.rglob("*.safetensors") if path.name != "golden.safetensors"]
    return {str(path.relative_to(folder)): raw(load_file(path)) for path in files}


def raw(tensors):
    return {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in tensors.items()}


def test_five_cases():
    assert len(CASES) == 5


@pytest.mark.parametrize("case", CASES)
def test_prompts_through_the_chat_template_read_the_same(case):
    """Structured parts give the same slots as the marks in a prompt; only merges across the joints may
    differ."""
    processor = LCLMProcessor.from_pretrained(FIXTURES / case)
    for golden in json.loads((FIXTURES / case / "golden.json").read_text()):
        parts, rest = [], golden["prompt"]
        while "<|memory_start|>" in rest:
            text, rest = rest.split("<|memory_start|>", 1)
            memory, rest = rest.split("<|memory_end|>", 1)
            parts += [{"type": "text", "text": text}] if text else []
            parts += [{"type": "memory", "text": memory}]
        parts += [{"type": "text", "text": rest}] if rest else []
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        marked = processor(text=golden["formatted"])
        for name in ("memory_sizes", "encoder_input_ids", "block_index"):
            assert torch.equal(inputs[name], marked[name])
        shown = [processor.tokenizer.decode(arrays["input_ids"][0]) for arrays in (inputs, marked)]
        assert shown[0] == shown[1]
