"""Tokenizers made here: text survives them, phrases are one token, controls cannot arise from text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipelines.tokenizers import CONTROLS, TokenizerSettings, limited, make_tokenizer
from lclm.model.text import ContentTokenizer, SpanTokenizer

WORDS = ["\nThe magic number for", "What is the magic number for", " is", "Repeat:", "Quote:", " {key}"]
KEYS = ["apple", "river"]
TEXTS = [
    Path(path).read_text() for path in (__file__, *map(str, Path(__file__).parents[2].glob("lclm/data/*.py")))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for settings_ in (
        TokenizerSettings(kind="bytes", words=WORDS, keys=KEYS),
        TokenizerSettings(kind="bpe", vocabulary=500),
        TokenizerSettings(kind="sentencepiece", vocabulary=500),
    ):
        made[settings_.kind] = tmp_path_factory.mktemp(settings_.kind)
        make_tokenizer(settings_, TEXTS, made[settings_.kind])
    return made


@pytest.fixture(scope="module")
def content(folders: dict[str, Path]) -> dict[str, ContentTokenizer]:
    return {kind: ContentTokenizer(AutoTokenizer.from_pretrained(path)) for kind, path in folders.items()}


def test_phrases_and_words_are_one_token(content: dict[str, ContentTokenizer]) -> None:
    encode = content["bytes"].encode
    for text in [
        "\nThe magic number for",
        "What is the magic number for",
        " is",
        " apple",
        "Repeat:",
        "Quote:",
    ]:
        assert len(encode(text)) == 1, text
    assert len(encode("\nThe magic number for river is 12345.\n")) == 3 + 1 + 5 + 2
    assert len(encode("What is the magic number for river?")) == 3
    assert len(encode(" apples")) == len(" apples")
    assert len(encode(" island")) == len(" island")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([*WORDS, *CONTROLS, " apple"])
    )
)
def test_any_text_round_trips(content: dict[str, ContentTokenizer], parts: list[str]) -> None:
    text = "".join(parts)
    for kind, tokenizer in content.items():
        if kind == "sentencepiece" and "▁" in text:
            continue
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_controls_marks_and_template(folders: dict[str, Path], kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    for control in CONTROLS:
        assert tokenizer(control, add_special_tokens=False).input_ids == [
            tokenizer.convert_tokens_to_ids(control)
        ]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = "<|user|>a<|end|><|assistant|>b<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    spans = SpanTokenizer(tokenizer).conversation(
        [
            {
                "role": "user",
                "content": [{"type": "memory", "text": "<|end|>"}, {"type": "text", "text": "q<|end|>"}],
            },
            {"role": "assistant", "content": "12"},
        ]
    )
    ids = [int(i) for span in spans for i in span.ids]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2
    assert [span.kind for span in spans].count("memory") == 1


def test_sentencepiece_agrees_with_the_library(folders: dict[str, Path], content: dict) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(folders["sentencepiece"] / "sentencepiece.model")
    )
    for line in TEXTS[0].splitlines()[:100]:
        assert content["sentencepiece"].encode(line).tolist() == processor.encode(line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "byte"}, "must be one of"),
        ({"kind": "bytes", "vocabulary": 400}, "no effect"),
        ({"kind": "bpe", "vocabulary": 400, "words": ["x y"]}, "no effect"),
        ({"kind": "bpe"}, "at least 300"),
        ({"kind": "bytes", "keys": ["a"]}, "{key}"),
    ],
)
def test_settings_without_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerSettings(**options)


def test_too_little_text(tmp_path: Path) -> None:
    for kind in ("bpe", "sentencepiece"):
        with pytest.raises(ValueError, match="vocabulary"):
            make_tokenizer(TokenizerSettings(kind=kind, vocabulary=20_000), ["a few words"], tmp_path)
    with pytest.raises(ValueError, match="single byte"):
        make_tokenizer(TokenizerSettings(kind="bytes", words=["a"]), [], tmp_path)


def test_limited() -> None:
    assert list(limited(["ab", "cd", "ef"], 3)) == ["ab", "cd"]
