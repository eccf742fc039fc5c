"""Hostile text stays text; marks in prompts are checked; templates cannot bend content."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lclm.model.text import MARKS, ContentTokenizer, SpanTokenizer, add_marks, mark_ids

FIXTURE = Path(__file__).parents[1] / "conformance" / "fixtures" / "mean-4x"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = ["<think>", "</think>", "<tool_call>"]


def with_think():
    """Added tokens that are not special, as Qwen3 has."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "decoder")
    tokenizer.add_tokens(THINK, special_tokens=False)
    return tokenizer


def whole_words():
    """A vocabulary whose own entries include the control tokens, with ignore_merges: content could hit
    them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|im_start|>", "<|im_end|>", *MARKS]
    vocabulary = {text: number for number, text in enumerate([*letters, *control])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_tokens(control, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def unigram():
    """Pieces with scores, the end-of-sequence token among them."""
    characters = [chr(number) for number in range(32, 127)]
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *[(c, -5.0) for c in characters],
        *[(mark, -1.0) for mark in MARKS],
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    add_marks(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return tokenizer


TOKENIZERS = {"think": with_think(), "whole words": whole_words(), "unigram": unigram()}
SPANS = {name: SpanTokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}
ADDED = sorted(
    {t.content for k in TOKENIZERS.values() for t in k.backend_tokenizer.get_added_tokens_decoder().values()}
)
HALVES = [text[:cut] for text in ADDED for cut in (2, len(text) // 2, len(text) - 1)] + [
    text[1:] for text in ADDED
]
LOOK_ALIKES = [
    text.replace("|", bar).replace("<", left).replace("_", line)
    for text in MARKS
    for bar, left, line in (
        ("｜", "<", "_"),
        ("|", "＜", "_"),
        ("|", "<", "＿"),
        ("│", "‹", "_"),
        ("|", "<", "\u200b_"),
    )
]
ATOMS = st.one_of(
    st.sampled_from(ADDED), st.sampled_from(HALVES), st.sampled_from(LOOK_ALIKES), st.text(max_size=6)
)
HOSTILE = st.lists(ATOMS, min_size=1, max_size=6).map("".join).filter(bool)
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def controls(name):
    tokenizer = TOKENIZERS[name]
    unknown = tokenizer.unk_token_id
    return {n for n in tokenizer.backend_tokenizer.get_added_tokens_decoder() if n != unknown}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_added_token_as_content_is_text(name):
    content = SPANS[name].content
    for text in ADDED:
        ids = content.encode(text)
        assert len(ids) and not controls(name) & set(ids.tolist())
        assert content.decode(ids) == text


@pytest.mark.parametrize("name", ["think", "whole words"])
@PROPERTY
@given(text=HOSTILE)
@example(text="<|memory_start|><|memory|><|memory_end|>")
def test_hostile_content_has_no_control_and_reads_back(name, text):
    content = SPANS[name].content
    for ids in (
        content.encode(text),
        content.encode_batch([text, text])[1],
        content.encode_with_offsets(text)[0],
    ):
        assert not controls(name) & set(ids.tolist())
        assert content.decode(ids) == text


@PROPERTY
@given(memory=HOSTILE, question=HOSTILE, answer=HOSTILE)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_messages_add_no_control(name, memory, question, answer):
    spans, content = SPANS[name], SPANS[name].content
    tame = spans.conversation(messages("a", "b", "c"), add_generation_prompt=True)
    hostile = spans.conversation(messages(memory, question, answer), add_generation_prompt=True)
    count = [
        [n for span in found if span.kind == "text" for n in span.ids if n in controls(name)]
        for found in (tame, hostile)
    ]
    assert count[0] == count[1]
    read = [span for span in hostile if span.kind == "memory"]
    assert len(read) == 1 and np.array_equal(read[0].ids, content.encode(memory))
    learned = np.concatenate([span.ids for span in hostile if span.loss])
    assert np.array_equal(learned[:-1], content.encode(answer)) and learned[-1] in controls(name)


def messages(memory, question, answer):
    parts = [{"type": "memory", "text": memory}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def test_offsets_are_where_tokens_can_be_cut():
    content, text = SPANS["think"].content, "a é € 𝄞 <|memory|> def f(x):\n\treturn x"
    ids, starts = content.encode_with_offsets(text)
    assert len(ids) == len(starts) and starts[0] == 0 and (starts == -1).any()
    for number in np.flatnonzero(starts >= 0):
        assert content.decode(ids[:number]) == text[: starts[number]]
        assert content.decode(ids[number:]) == text[starts[number] :]


def test_prompt_splits_at_marks_and_keeps_control_tokens_outside():
    spans = SPANS["think"].prompt(
        "<|im_start|>a<|memory_start|>b <|im_end|><|memory_end|> c <|memory_start", ratio=4
    )
    assert [span.kind for span in spans] == ["text", "memory", "text"]
    assert spans[0].ids[0] == TOKENIZERS["think"].convert_tokens_to_ids("<|im_start|>")
    assert spans[1].ratio == 4 and SPANS["think"].content.decode(spans[1].ids) == "b <|im_end|>"
    assert not set(spans[2].ids.tolist()) & set(mark_ids(TOKENIZERS["think"]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a<|memory_start|>b", "character 1 is never closed"),
        ("a<|memory_end|>b", "character 1 closes nothing"),
        ("<|memory_start|>a<|memory_start|>b<|memory_end|><|memory_end|>", "cannot nest"),
        ("<|memory_start|><|memory_end|>", "is empty"),
        ("a<|memory|>b", "slots are made by the processor"),
        ("<|memory_start|>a<|memory|><|memory_end|>", "slots are made by the processor"),
        ("", "the prompt is empty"),
        ("a\ud800b", "lone surrogate"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        SPANS["think"].prompt(prompt)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": "a", "name": "b"}], "unknown key 'name'"),
        ([{"role": "user<|im_end|>", "content": "a"}], "one word"),
        ([{"role": "user", "content": 3}], "string or a list"),
        ([{"role": "user", "content": [{"type": "image", "text": "a"}]}], "message 0, part 0"),
        ([{"role": "user", "content": [{"type": "memory", "text": ""}]}], "empty memory"),
        ([{"role": "user", "content": [{"type": "memory", "text": "a", "ratio": 0}]}], "ratio 0"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "ratio": 4}]}], "unknown key 'ratio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a 'text' that is a string"),
    ],
)
def test_bad_messages(bad, message):
    with pytest.raises(ValueError, match=message):
        SPANS["think"].conversation(bad)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
        "{{ messages[0]['content'] }}",
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'][:5] }}{% endfor %}",
    ],
)
def test_templates_that_bend_content_are_refused(template):
    with pytest.raises(ValueError, match="chat template"):
        SPANS["think"].conversation(messages("a", "b", "c"), chat_template=template)


def test_loss_is_on_assistant_content_and_its_end_of_turn():
    spans = SPANS["think"].conversation([*messages("doc", "q", "yes"), *messages("more", "q", "no")])
    shown = [TOKENIZERS["think"].decode(span.ids) for span in spans if span.loss]
    assert shown == ["yes<|im_end|>", "no<|im_end|>"]
    ends = SPANS["think"].end_ids
    assert TOKENIZERS["think"].convert_tokens_to_ids("<|im_end|>") in ends


def test_tokenizers_that_cannot_serve():
    bare = AutoTokenizer.from_pretrained(FIXTURE / "encoder")
    with pytest.raises(ValueError, match=r"lacks the marks .*add_marks"):
        SpanTokenizer(bare)
    assert add_marks(bare) == 3 and add_marks(bare) == 0
    assert len(set(mark_ids(bare))) == 3
    with pytest.raises(ValueError, match="no fast backend"):
        ContentTokenizer(object())
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SpanTokenizer(bare).conversation(messages("a", "b", "c"))


def test_truncation_and_padding_of_the_file_do_not_apply():
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "decoder")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    spans = SpanTokenizer(tokenizer)
    text = "one two three four five six seven"
    assert spans.content.decode(spans.content.encode(text)) == text
    assert 4 < len(spans.controls(text)) < 64
