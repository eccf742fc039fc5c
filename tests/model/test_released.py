"""model_config.json of the released layout: its keys mean what they say, and what is odd is named."""

import json
import logging
import re

import pytest

from lclm.model.released import read_settings

WHOLE = {
    "compression_ratio": 8,
    "encoder_window_size": 64,
    "pooling": "concat",
    "encoder_mask_type": "bidirectional",
    "boundary_overlap": 4,
    "adapter_type": "attn_mlp",
    "num_adapter_layers": 2,
}


@pytest.fixture
def warnings(caplog, monkeypatch):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    return caplog


def read(folder, content):
    (folder / "model_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_settings(folder)


def test_every_key_has_its_meaning(tmp_path, warnings):
    assert read(tmp_path, WHOLE) == {
        "ratio": 8,
        "window": 64,
        "pooling": "concat",
        "encoder_attention": "bidirectional",
        "overlap": 4,
        "adapter": "attn_mlp",
        "adapter_layers": 2,
    }
    plain = {**WHOLE, "adapter_type": "mlp", "num_adapter_layers": 1}
    assert read(tmp_path, plain)["adapter_layers"] == 0
    assert read(tmp_path, {**WHOLE, "num_adapter_layers": None})["adapter_layers"] is None
    assert not warnings.records


def test_a_missing_key_with_a_default_is_told_of(tmp_path, warnings):
    settings = read(tmp_path, {"compression_ratio": 4, "encoder_window_size": 32, "boundary_overlap": None})
    assert settings == {
        "ratio": 4,
        "window": 32,
        "pooling": "mean",
        "encoder_attention": "causal",
        "overlap": 0,
        "adapter": "mlp",
        "adapter_layers": 0,
    }
    for name in ("pooling", "encoder_mask_type", "boundary_overlap", "adapter_type"):
        assert f"model_config.json does not say '{name}'" in warnings.text
    assert "num_adapter_layers" not in warnings.text


def test_an_unknown_key_is_told_of_and_breaks_nothing(tmp_path, warnings):
    extras = {"version": "1.0", "authors": ["a"], "ratio": 16, "tie_word_embeddings": False}
    assert read(tmp_path, {**WHOLE, **extras})["ratio"] == 8
    for name in extras:
        assert f"'{name}' is not known and has no effect" in warnings.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression_ratio": None}, r"lacks 'compression_ratio'; it must be a whole number, 1 or more"),
        ({"encoder_window_size": None}, r"lacks 'encoder_window_size'; it must be a whole number"),
        ({"compression_ratio": "8"}, r"'compression_ratio' is '8'; it must be a whole number, 1 or more"),
        ({"compression_ratio": True}, r"'compression_ratio' is True; it must be a whole number"),
        ({"compression_ratio": 0}, r"'compression_ratio' is 0; it must be a whole number, 1 or more"),
        ({"encoder_window_size": -64}, r"'encoder_window_size' is -64; it must be a whole number, 1 or more"),
        ({"encoder_window_size": 64.0}, r"'encoder_window_size' is 64\.0; it must be a whole number"),
        (
            {"encoder_window_size": 60},
            r"'compression_ratio' is 8, which does not divide .* 60; the window",
        ),
        ({"pooling": "max"}, r"'pooling' is 'max'; it must be one of mean, concat, eos"),
        ({"pooling": ["mean"]}, r"'pooling' is \['mean'\]; it must be one of mean"),
        ({"encoder_mask_type": False}, r"'encoder_mask_type' is False; it must be one of causal, bidirect"),
        ({"boundary_overlap": -1}, r"'boundary_overlap' is -1; it must be a whole number, 0 or more"),
        ({"boundary_overlap": False}, r"'boundary_overlap' is False; it must be a whole number"),
        (
            {"adapter_type": "linear"},
            r"'adapter_type' is 'linear'; it must be one of mlp, attn_mlp",
        ),
        ({"num_adapter_layers": 0}, r"'num_adapter_layers' is 0; 'adapter_type' 'attn_mlp' needs 1 or more"),
        ({"position_in_block": True}, r"'position_in_block' is True, which the released layout cannot hold"),
    ],
    ids=str,
)
def test_what_is_odd_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/model_config\.json.*{message}"):
        read(tmp_path, {**WHOLE, **changes})


@pytest.mark.parametrize(
    ("name", "other"),
    [("boundary_overlap", "boundry_overlap"), ("compression_ratio", "ratio"), ("adapter_type", "adapter")],
)
def test_a_key_by_another_name_is_refused(name, other, tmp_path):
    content = {other if key == name else key: value for key, value in WHOLE.items()}
    with pytest.raises(ValueError, match=f"'{other}' is not a key of this file; write '{name}'"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot read"), ("[1]", "holds a JSON list"), ('"a"', "holds a JSON str")]
)
def test_what_is_no_object_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)
