"""Exports: the same model in another folder, layout, precision or size of files, whole or not at all."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lclm.checkpoint import checksums, list_files, sha256
from lclm.hub.export import export_run
from lclm.hub.shards import list_weights
from lclm.model import LCLMForConditionalGeneration, LCLMProcessor
from lclm.model.build import build_model, build_processor
from lclm.model.settings import DecoderSettings, EncoderSettings, ModelSettings
from lclm.stored import open_stored
from tests.hub import peak

FIXTURES = Path(__file__).parent.parent / "conformance" / "fixtures"
CHECKPOINT = FIXTURES / "mean-4x"
SHARD = "200KB"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one complete stage and one that is not."""
    folder = tmp_path_factory.mktemp("run")
    export = folder / "stages" / "01-adapter" / "export"
    LCLMForConditionalGeneration.from_pretrained(CHECKPOINT).save_pretrained(export)
    LCLMProcessor.from_pretrained(CHECKPOINT).save_pretrained(export)
    done = {"export": checksums(export, list_files(export))}
    (folder / "stages" / "01-adapter" / "done.json").write_text(json.dumps(done))
    (folder / "stages" / "02-joint" / "checkpoints").mkdir(parents=True)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = LCLMForConditionalGeneration.from_pretrained(folder).eval()
    prompt = "read <|memory_start|>some text of a document<|memory_end|> and say"
    with torch.no_grad():
        return model(**LCLMProcessor.from_pretrained(folder)(text=prompt, return_tensors="pt")).logits


def files(folder: Path) -> dict[str, str]:
    """Every file's checksum; JSON by its content."""
    return {
        str(path.relative_to(folder)): json.dumps(json.loads(path.read_text()), sort_keys=True)
        if path.suffix == ".json"
        else sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file-independent name."""
    found = {}
    for path in folder.rglob("*[rl0-9].safetensors"):  # not golden.safetensors
        with safe_open(path, framework="pt") as file:
            part = "" if path.parent == folder else f"{path.parent.name}."
            found |= {part + name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def save(folder: Path, source: Path, **options: Any) -> Path:
    """What transformers writes of a model that is loaded whole."""
    dtype, layout = options.pop("dtype", "auto"), options["layout"]
    model = LCLMForConditionalGeneration.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder, **options)
    LCLMProcessor.from_pretrained(source).save_pretrained(folder, layout=layout)
    return folder


@pytest.mark.parametrize("layout", ["native", "released"])
def test_an_export_is_the_same_model(run: Path, tmp_path: Path, layout: str) -> None:
    folder = export_run(run, tmp_path / "out", layout=layout)
    assert (folder / "decoder").is_dir() == (layout == "released")
    torch.testing.assert_close(logits(folder), logits(CHECKPOINT), rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["native", "released"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_streamed_files_are_those_of_save_pretrained(
    run: Path, tmp_path: Path, layout: str, dtype: str | None
) -> None:
    folder = export_run(run, tmp_path / "out", layout=layout, dtype=dtype, shard_size=SHARD)
    source = run / "stages" / "01-adapter" / "export"
    precision = getattr(torch, dtype or "float32")
    expected = save(tmp_path / "whole", source, layout=layout, dtype=precision, max_shard_size=SHARD)
    assert files(folder) == files(expected)
    assert len(list(folder.rglob("model-*.safetensors"))) >= 2


@pytest.mark.parametrize("fixture", sorted(path.name for path in FIXTURES.iterdir()))
def test_there_and_back_keeps_every_bit(tmp_path: Path, fixture: str) -> None:
    native = export_run(FIXTURES / fixture, tmp_path / "native")
    assert files(native) == files(save(tmp_path / "whole", FIXTURES / fixture, layout="native"))
    released = export_run(native, tmp_path / "released", layout="released", shard_size=SHARD)
    again = export_run(released, tmp_path / "again")
    assert files(again) == files(native)
    before, after = weights(FIXTURES / fixture), weights(released)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_learned_brackets_leave_the_decoder_as_it_was(tmp_path: Path) -> None:
    model = LCLMForConditionalGeneration.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        model.brackets.weight.add_(1)
    model.save_pretrained(tmp_path / "model")
    LCLMProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "model")
    released = export_run(tmp_path / "model", tmp_path / "released", layout="released")
    assert files(released) == files(save(tmp_path / "whole", tmp_path / "model", layout="released"))
    again = export_run(released, tmp_path / "again")
    assert files(again) == files(tmp_path / "model")
    assert files(again) == files(save(tmp_path / "same", released, layout="native"))


def test_tied_embeddings_and_places_in_a_block(tmp_path: Path) -> None:
    part = LCLMForConditionalGeneration.read_config(CHECKPOINT).decoder_config.to_dict()
    part = {name: value for name, value in part.items() if name not in ("architectures", "dtype")}
    settings = ModelSettings(
        encoder=EncoderSettings(config=part),
        decoder=DecoderSettings(config=part, tokenizer=str(CHECKPOINT / "decoder")),
        tie_embeddings=True,
        position_in_block=True,
        ratios=[2, 4],
        window=64,
    )
    build_model(settings).save_pretrained(tmp_path / "model")
    build_processor(settings).save_pretrained(tmp_path / "model")
    out = export_run(tmp_path / "model", tmp_path / "out", dtype="float32")
    assert files(out) == files(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot hold embeddings shared"):
        export_run(tmp_path / "model", tmp_path / "other", layout="released")
    assert not (tmp_path / "other.tmp").exists()


def test_merged_experts_are_written_apart(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    found = {weight.name: weight.read() for weight in list_weights(model, state.__getitem__)}
    expected = weights(tmp_path)
    assert found.keys() == expected.keys() and any("experts.2" in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown complete stage 'joint'; did you mean 'adapter'"):
        export_run(run, tmp_path / "out", stage="joint")
    with pytest.raises(ValueError, match="unknown layout 'nativ'; did you mean 'native'"):
        export_run(run, tmp_path / "out", layout="nativ")
    with pytest.raises(ValueError, match="unknown dtype 'float16'"):
        export_run(run, tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match="give a size such as 4GB"):
        export_run(run, tmp_path / "out", shard_size="large")
    with pytest.raises(ValueError, match="exists already"):
        export_run(run, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no stage is complete yet.*--step newest"):
        export_run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="is a checkpoint, not a run"):
        export_run(CHECKPOINT, tmp_path / "out", stage="joint")
    assert not (tmp_path / "out").exists()


def test_damage_is_named_and_nothing_is_left(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "stages" / "01-adapter" / "export" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that was written"):
        export_run(copy, tmp_path / "out")
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        export_run(path.parent, tmp_path / "out", layout="released")
    stored = open_stored(CHECKPOINT)

    def fails_late(name: str) -> torch.Tensor:
        if name.startswith("decoder.model.layers.1"):
            raise ValueError("the disk hums")
        return stored.read(name)

    with pytest.raises(ValueError, match="the disk hums"):
        export_run(run, tmp_path / "out", shard_size=SHARD, weights=replace(stored, read=fails_late))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_said_and_nothing_is_left(run: Path, tmp_path: Path) -> None:
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"could not write .*MiB are free"):
            export_run(run, tmp_path / "out", shard_size=SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_a_few_shards(tmp_path: Path) -> None:
    shard = 20 * 2**20
    peak.write_large(tmp_path / "large")
    assert peak.measure(tmp_path / "large", tmp_path / "out", "released", shard) < 3 * shard


@pytest.mark.slow
def test_killed_half_way_it_has_not_its_name(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom lclm.hub.export import export_run\n"
        "def stop(done, total):\n    if done > total / 3:\n        time.sleep(600)\n"
        "export_run(Path(sys.argv[1]), Path(sys.argv[2]), shard_size='100KB', progress=stop)"
    )
    output, half = tmp_path / "out", tmp_path / "out.tmp"
    process = subprocess.Popen([sys.executable, "-c", program, str(CHECKPOINT), str(output)])
    until = time.monotonic() + 60
    while len(list(half.glob("*.safetensors"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert half.is_dir() and not output.exists()
    export_run(CHECKPOINT, output)
    assert not half.exists() and (output / "config.json").is_file()
