from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lclm.hub.export import export_run
from lclm.model import LCLMForConditionalGeneration, LCLMProcessor

CHECKPOINT = Path(__file__).parent.parent / "conformance" / "fixtures" / "mean-4x"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one complete stage and one that is not."""
    folder = tmp_path_factory.mktemp("run")
    export = folder / "stages" / "01-adapter" / "export"
    LCLMForConditionalGeneration.from_pretrained(CHECKPOINT).save_pretrained(export)
    LCLMProcessor.from_pretrained(CHECKPOINT).save_pretrained(export)
    (folder / "stages" / "01-adapter" / "done.json").write_text(json.dumps({}))
    (folder / "stages" / "02-joint" / "checkpoints").mkdir(parents=True)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = LCLMForConditionalGeneration.from_pretrained(folder).eval()
    prompt = "read <|memory_start|>some text of a document<|memory_end|> and say"
    with torch.no_grad():
        return model(**LCLMProcessor.from_pretrained(folder)(text=prompt, return_tensors="pt")).logits


@pytest.mark.parametrize("layout", ["native", "released"])
def test_an_export_is_the_same_model(run: Path, tmp_path: Path, layout: str) -> None:
    folder = export_run(run, tmp_path / "out", layout=layout)
    assert (folder / "decoder").is_dir() == (layout == "released")
    torch.testing.assert_close(logits(folder), logits(CHECKPOINT), rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown complete stage 'joint'; did you mean 'adapter'"):
        export_run(run, tmp_path / "out", stage="joint")
    with pytest.raises(ValueError, match="unknown layout 'nativ'; did you mean 'native'"):
        export_run(run, tmp_path / "out", layout="nativ")
    with pytest.raises(ValueError, match="exists already"):
        export_run(run, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no stage is complete yet"):
        export_run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
