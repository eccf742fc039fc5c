"""Native and released layouts, brackets, and broken files."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lclm.model import LCLMForConditionalGeneration, LCLMProcessor, layouts

FIXTURE = Path(__file__).parents[1] / "conformance" / "fixtures" / "mean-4x"


def logits(model, tiny, rng_seed=0):
    example = tiny.example([("text", 3), ("memory", 21), ("text", 4)], np.random.default_rng(rng_seed))
    arrays = tiny.lay_out([[example]], model)
    with torch.no_grad():
        return model(**{k: v for k, v in arrays.items() if k != "labels"}).logits


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"encoder": "bert", "encoder_attention": "bidirectional"},
        {"adapter": "mlp_attn", "adapter_layers": 2},
        {"adapter": "attn_mlp", "pooling": "concat"},
        {"position_in_block": True, "ratios": [2, 4]},
        {"overlap": 4},
    ],
    ids=str,
)
def test_native_round_trip(choice, tiny, tmp_path):
    model = tiny.model(**choice)
    model.save_pretrained(tmp_path)
    again = LCLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.geometry() == model.config.geometry()
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LCLMForConditionalGeneration)


def copy_tokenizers(folder):
    for part in ("decoder", "encoder"):
        AutoTokenizer.from_pretrained(FIXTURE / part).save_pretrained(folder / part)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"encoder_attention": "bidirectional", "overlap": 4},
        {"adapter": "mlp_attn", "adapter_layers": 2},
        {"adapter": "attn_mlp", "pooling": "concat"},
        {"pooling": "eos"},
    ],
    ids=str,
)
def test_released_round_trip_writes_learned_brackets_into_the_table(choice, tiny, tmp_path):
    decoder = {**tiny.decoder, "vocab_size": 703, "tie_word_embeddings": False}
    marks = {"memory_start_id": 700, "memory_end_id": 701, "memory_id": 702}
    model = tiny.model(decoder=decoder, **marks, **choice)
    with torch.no_grad():
        model.brackets.weight.normal_()
    before = model.state_dict()["decoder.model.embed_tokens.weight"].clone()
    model.save_pretrained(tmp_path, layout="released")
    copy_tokenizers(tmp_path)
    assert torch.equal(model.state_dict()["decoder.model.embed_tokens.weight"], before)
    again = LCLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.brackets.weight, model.brackets.weight)
    assert torch.equal(again.get_input_embeddings().weight, before)
    written = load_file(tmp_path / "decoder" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(written[[700, 701]], model.brackets.weight)
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    assert again.config.geometry() == model.config.geometry()


def test_state_dict_of_a_sharded_engine_can_be_given(tiny, tmp_path):
    decoder = {**tiny.decoder, "vocab_size": 703}
    model = tiny.model(decoder=decoder, memory_start_id=700, memory_end_id=701, memory_id=702)
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    for layout in ("native", "released"):
        model.save_pretrained(tmp_path / layout, layout=layout, state_dict=dict(weights))
        if layout == "released":
            copy_tokenizers(tmp_path / layout)
        again = LCLMForConditionalGeneration.from_pretrained(tmp_path / layout).state_dict()
        assert torch.equal(again["adapter.fc1.weight"], weights["adapter.fc1.weight"])
        assert torch.equal(
            again["decoder.model.layers.0.mlp.up_proj.weight"],
            weights["decoder.model.layers.0.mlp.up_proj.weight"],
        )
        assert torch.equal(again["brackets.weight"], weights["brackets.weight"])


@pytest.mark.parametrize("choice", [{}, {"encoder": "tied", "tie_word_embeddings": True}], ids=str)
def test_without_the_encoder_what_remains_is_the_same(choice, tiny, tmp_path, caplog):
    model = tiny.model(position_in_block=True, **choice)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    reader = LCLMForConditionalGeneration.from_pretrained(tmp_path, encoder=False)
    assert "encoder" not in caplog.text
    check_reader(reader, model, tiny.lay_out([[tiny.example([("text", 3), ("memory", 21)], rng())]], model))


def test_without_the_encoder_released(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "checkpoint")
    for weights in ("encoder/model.safetensors", "adapter/adapter.safetensors"):
        spoil(tmp_path / "checkpoint" / weights)
    reader = LCLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", encoder=False)
    arrays = LCLMProcessor.from_pretrained(FIXTURE)(text="<|memory_start|>ab<|memory_end|>c")
    check_reader(reader, LCLMForConditionalGeneration.from_pretrained(FIXTURE), arrays)


def test_only_the_weights_that_are_needed_are_fetched(tmp_path, monkeypatch):
    """From a Hub that holds the fixture: each loader's files, by what it lets the Hub client leave out."""
    left_out = []

    def download(name, ignore_patterns, **_):
        left_out.append(ignore_patterns)
        found = shutil.ignore_patterns(*[Path(pattern).name for pattern in ignore_patterns])
        folder = tmp_path / str(len(left_out))
        for part in ("encoder", "adapter", "decoder"):
            here = [pattern for pattern in ignore_patterns if pattern.startswith(part)]
            shutil.copytree(FIXTURE / part, folder / part, ignore=found if here else None)
        shutil.copy(FIXTURE / "model_config.json", folder)
        return str(folder)

    cached = {"model_config.json": str(FIXTURE / "model_config.json")}
    monkeypatch.setattr(layouts, "cached_file", lambda name, file, **_: cached.get(file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert LCLMForConditionalGeneration.from_pretrained("org/model").config.ratio == 4
    assert LCLMForConditionalGeneration.read_config("org/model").ratio == 4
    assert LCLMProcessor.from_pretrained("org/model").geometry["ratio"] == 4
    fetched = [(tmp_path / str(number)).rglob("*.safetensors") for number in (1, 2, 3)]
    parts = [sorted(path.parent.name for path in paths) for paths in fetched]
    assert parts == [["adapter", "decoder", "encoder"], ["adapter"], []]


def rng():
    return np.random.default_rng(0)


def spoil(path):
    """Everything after the header of a safetensors file becomes other numbers."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    path.write_bytes(content)


def check_reader(reader, model, arrays):
    whole = model.state_dict()
    kept = {name for name in whole if name.startswith(("decoder.", "brackets."))}
    assert set(reader.state_dict()) == kept
    assert all(torch.equal(value, whole[name]) for name, value in reader.state_dict().items())
    names = ("input_ids", "latent_index", "position_ids")
    encoder = ("encoder_input_ids", "encoder_position_ids", "encoder_window_ids", "block_index")
    with torch.no_grad():
        latents = model.encode(*(arrays[name] for name in encoder), arrays["memory_sizes"])
        read = {name: arrays[name] for name in names} | {"latents": latents}
        assert torch.equal(reader(**read).logits, model(**read).logits)
    with pytest.raises(ValueError, match="loaded with encoder=False"):
        reader.encode(*(arrays[name] for name in encoder), arrays["memory_sizes"])
    with pytest.raises(ValueError, match="load it whole to save it"):
        reader.save_pretrained("unused")


def test_dtype_and_attention_reach_both_parts():
    model = LCLMForConditionalGeneration.from_pretrained(
        FIXTURE, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {model.encoder.config._attn_implementation, model.decoder.config._attn_implementation} == {"eager"}


@pytest.fixture
def broken(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(FIXTURE, folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_config.json").write_text("{"), r"cannot read .*model_config.json"),
        (lambda f: (f / "model_config.json").write_text("{}"), "lacks 'compression_ratio'"),
        (lambda f: edit(f, compression_ratio=5), "which does not divide .encoder_window_size., 32"),
        (lambda f: edit(f, pooling="concat"), "does not fit"),
        (lambda f: (f / "adapter" / "adapter.safetensors").write_bytes(b"x" * 40), "cannot read the adapter"),
        (lambda f: (f / "adapter" / "adapter.safetensors").unlink(), "cannot read the adapter"),
        (
            lambda f: shutil.copy(f / "encoder" / "tokenizer.json", f / "decoder" / "tokenizer.json"),
            "lacks the marks",
        ),
    ],
)
def test_broken_checkpoints_say_what_is_wrong(broken, damage, message):
    damage(broken)
    for name in ("tokenizer_config.json",):
        path = broken / "decoder" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": []}))
    with pytest.raises(ValueError, match=message):
        LCLMForConditionalGeneration.from_pretrained(broken)


def edit(folder, **changes):
    path = folder / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_layout(tiny, tmp_path):
    with pytest.raises(ValueError, match="'native' or 'released'"):
        tiny.model().save_pretrained(tmp_path, layout="flat")
    with pytest.raises(ValueError, match="no place for position_in_block"):
        tiny.model(position_in_block=True).save_pretrained(tmp_path, layout="released")
