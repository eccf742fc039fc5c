"""Tiny models over every choice, and random span structures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lclm.model import LCLMConfig, LCLMForConditionalGeneration
from lclm.model.spans import Example, Span, lay_out

VOCABULARY = 61
DECODER = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ENCODERS = {
    "qwen3": {**DECODER, "hidden_size": 24, "head_dim": 6, "vocab_size": 53, "tie_word_embeddings": False},
    "bert": {
        "model_type": "bert",
        "vocab_size": 53,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
IDS = {
    "memory_start_id": 58,
    "memory_end_id": 59,
    "memory_id": 60,
    "pad_id": 0,
    "encoder_pad_id": 0,
    "encoder_marker_id": 0,
}


ENCODERS["tied"] = DECODER


def _config(encoder="qwen3", attention="sdpa", decoder=None, **options):
    settings = {"ratio": 4, "window": 16, **IDS, **options}
    config = LCLMConfig(encoder_config=ENCODERS[encoder], decoder_config=decoder or DECODER, **settings)
    config._attn_implementation = attention
    return config


def _model(*args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LCLMForConditionalGeneration(_config(*args, **options)).eval()


def _tensors(arrays):
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _example(kinds, rng, ratio=None):
    """An example of (kind, length) pairs; memory lengths may carry a ratio as a third part."""
    spans = []
    for kind, length, *own in kinds:
        if kind == "memory":
            ids = rng.integers(2, 53, length)
            spans.append(Span("memory", ids, ratio=own[0] if own else ratio))
        else:
            spans.append(Span("text", rng.integers(2, 57, length), loss=kind == "loss"))
    return Example(tuple(spans))


@st.composite
def _examples(draw, ratios=(None,), most=5):
    """Random span structures: one to `most` examples of text, text with loss, and memories."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    text = st.tuples(st.sampled_from(["text", "loss"]), st.integers(1, 9))
    memory = st.tuples(st.just("memory"), st.integers(1, 41), st.sampled_from(ratios))
    structures = draw(
        st.lists(st.lists(st.one_of(text, memory), min_size=1, max_size=4), min_size=1, max_size=most)
    )
    return [_example(structure, rng) for structure in structures]


@pytest.fixture(scope="session")
def tiny():
    """config, model: builders of tiny ones. example, examples, tensors: span structures and their arrays."""
    return SimpleNamespace(
        config=_config,
        model=_model,
        example=_example,
        examples=_examples,
        tensors=_tensors,
        decoder=DECODER,
        encoders=ENCODERS,
        ids=IDS,
        lay_out=lambda rows, model, **options: _tensors(lay_out(rows, model.config.geometry(), **options)),
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)
