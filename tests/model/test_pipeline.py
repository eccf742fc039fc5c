"""The pipeline for memories: conversations and prompts, one or many, as text generation returns them."""

import sys
from pathlib import Path

import pytest
from transformers import dynamic_module_utils, pipeline

from lclm.model import LCLMForConditionalGeneration, LCLMPipeline, LCLMProcessor
from lclm.model.pipeline import TASK

FIXTURE = Path(__file__).parents[1] / "conformance" / "fixtures" / "mean-4x"
GREEDY = {"max_new_tokens": 5, "do_sample": False}
DOCUMENTS = ["def add(a, b):\n    return a + b\n", "A much longer document about nothing at all.\n" * 4]


def chat(*documents, question="What does it do?"):
    parts = [{"type": "memory", "text": text} for text in documents]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


CHATS = [chat(DOCUMENTS[0]), chat(*DOCUMENTS), [{"role": "user", "content": "No memory."}]]
PROMPTS = [f"<|memory_start|>{DOCUMENTS[0]}<|memory_end|> What?", "no memory"]


@pytest.fixture(scope="module")
def parts():
    return LCLMForConditionalGeneration.from_pretrained(FIXTURE), LCLMProcessor.from_pretrained(FIXTURE)


@pytest.fixture(scope="module")
def pipe(parts):
    return pipeline(TASK, model=parts[0], processor=parts[1], device=-1)


def generated(parts, asked, **options):
    """What `generate` itself makes of one conversation or prompt: its new text."""
    model, processor = parts
    if isinstance(asked, str):
        inputs = processor(text=asked)
    else:
        inputs = processor.apply_chat_template(asked, add_generation_prompt=True)
    ids = model.generate(**inputs, **{**GREEDY, **options})[:, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def answered(asked, text):
    if isinstance(asked, str):
        return {"generated_text": asked + text}
    return {"generated_text": [*asked, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize("several", [CHATS, PROMPTS], ids=["chats", "prompts"])
def test_one_and_many_are_answered_as_generate_does(several, pipe, parts):
    assert type(pipe) is LCLMPipeline
    expected = [[answered(asked, generated(parts, asked)[0])] for asked in several]
    assert [pipe(asked, **GREEDY) for asked in several] == expected
    assert pipe(several, **GREEDY) == expected
    assert pipe(several, batch_size=2, **GREEDY) == expected
    assert list(pipe((asked for asked in several), **GREEDY)) == expected


def test_generation_options(pipe, parts):
    asked = CHATS[1]
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    found = pipe([asked, CHATS[0]], return_full_text=False, **{**GREEDY, **beams})
    assert found[0] == [{"generated_text": text} for text in generated(parts, asked, **beams)]
    assert len(found[1]) == 2
    short = pipeline(TASK, model=parts[0], processor=parts[1], device=-1, return_full_text=False, **GREEDY)
    assert short(asked) == [{"generated_text": generated(parts, asked)[0]}]
    assert short(asked, max_new_tokens=2) == [
        {"generated_text": generated(parts, asked, max_new_tokens=2)[0]}
    ]
    assert pipe.generation_config.max_new_tokens == 256
    with pytest.raises(ValueError, match="ratio"):
        pipe(asked, ratio=3, **GREEDY)


def test_artifacts_are_read_in_place_of_text(pipe, parts):
    model, processor = parts
    artifact = model.compress(processor, DOCUMENTS)
    question = {"type": "text", "text": "What does it do?"}
    ready = [{"role": "user", "content": [{"type": "memory", "artifact": artifact}, question]}]
    mixed = [ready, CHATS[0]]
    texts = [pipe(asked, return_full_text=False, **GREEDY) for asked in (CHATS[1], CHATS[0])]
    assert pipe(mixed, return_full_text=False, **GREEDY) == texts
    assert pipe(mixed, return_full_text=False, batch_size=2, **GREEDY) == texts


def test_what_cannot_be_answered_is_refused(pipe):
    with pytest.raises(ValueError, match="end it with the user's"):
        pipe([*CHATS[0], {"role": "assistant", "content": "It"}], **GREEDY)
    with pytest.raises(ValueError, match="never closed"):
        pipe("<|memory_start|>text", **GREEDY)


def test_text_generation_reads_plain_prompts_and_refuses_marks(parts):
    model, processor = parts
    plain = pipeline("text-generation", model=model, tokenizer=processor.tokenizer, device=-1)
    assert plain(PROMPTS[1], **GREEDY) == [answered(PROMPTS[1], generated(parts, PROMPTS[1])[0])]
    assert plain(CHATS[2], **GREEDY) == [answered(CHATS[2], generated(parts, CHATS[2])[0])]
    for marked in (PROMPTS[0], "<|memory_start|><|memory|><|memory_end|>", [PROMPTS[1], PROMPTS[0]]):
        with pytest.raises(ValueError, match="without latents"):
            plain(marked, **GREEDY)


def test_saving_a_pipeline_saves_a_checkpoint(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe.save_pretrained(tmp_path)
    again = pipeline(model=str(tmp_path), trust_remote_code=True, device=-1)
    assert again(CHATS[1], **GREEDY) == pipe(CHATS[1], **GREEDY)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
