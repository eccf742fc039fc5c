"""Exported checkpoints load where lclm is not importable, with the code that travels with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

import lclm.model
from lclm.model import LCLMConfig, LCLMForConditionalGeneration, LCLMProcessor
from lclm.model.build import build_model, build_processor
from lclm.model.fingerprint import fingerprints
from lclm.model.native import save_without_weights
from lclm.recipe import load_recipe
from lclm.settings import shipped_recipes
from tests.model import remote

FIXTURES = Path(__file__).parents[1] / "conformance" / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
SHARDED = "mean-4x"
DOCUMENT = "def add(a, b):\n    return a + b\n# <|memory_end|><|im_end|> é\n" * 9
MESSAGES = [
    {"role": "user", "content": [{"type": "memory", "text": DOCUMENT}, {"type": "text", "text": "What? 1<2"}]}
]


def prompts_of(case):
    golden = json.loads((FIXTURES / (case if case in CASES else SHARDED) / "golden.json").read_text())
    return [entry["formatted"] for entry in golden]


def load(folder):
    return LCLMForConditionalGeneration.from_pretrained(folder), LCLMProcessor.from_pretrained(folder)


def built(case):
    """Model and processor: of a fixture, or of the tiny recipe, trained for three steps; "apart": with what
    the released layout can hold."""
    if case in CASES:
        return tuple(
            cls.from_pretrained(FIXTURES / case) for cls in (LCLMForConditionalGeneration, LCLMProcessor)
        )
    overrides = [f"model.decoder.tokenizer={FIXTURES / SHARDED / 'decoder'}"]
    if case == "apart":
        overrides += ["model.tie_embeddings=false", "model.position_in_block=false", "model.ratios=[4]"]
    settings = load_recipe(shipped_recipes() / "tiny.yaml", overrides).model
    model, processor = build_model(settings), build_processor(settings)
    answer = [*MESSAGES, {"role": "assistant", "content": "It adds."}]
    batch = processor.apply_chat_template(answer, return_labels=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), processor


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """{checkpoint: (what it answers here, what it answers without lclm)}, and the folder of checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    here, todo = {}, {}
    for case in [*CASES, "tiny", "apart"]:
        model, processor = built(case)
        if case == "apart":
            model.save_pretrained(folder / "first")
            model.save_pretrained(folder / "released", layout="released")
            processor.save_pretrained(folder / "released", layout="released")
            here["trained"] = remote.answers(model, processor, prompts_of(case), MESSAGES)
            model, processor = load(folder / "released")
        model.save_pretrained(folder / case, max_shard_size="100KB" if case == SHARDED else "1GB")
        processor.save_pretrained(folder / case)
        here[case] = remote.answers(model, processor, prompts_of(case), MESSAGES)
        todo[case] = {"prompts": prompts_of(case), "messages": MESSAGES, "again": case == "tiny"}
    (folder / "todo.json").write_text(json.dumps({"threads": torch.get_num_threads(), "checkpoints": todo}))
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, remote.__file__, str(folder)], capture_output=True, text=True, cwd=folder, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = {
        case: (load_file(folder / f"{case}.safetensors"), json.loads((folder / f"{case}.json").read_text()))
        for case in todo
    }
    return here, there, folder


@pytest.mark.parametrize("case", [*CASES, "tiny", "apart"])
def test_answers_are_the_same_where_lclm_is_not(case, loaded_elsewhere):
    here, there, _ = loaded_elsewhere
    (tensors, rest), (others, other) = here[case], there[case]
    assert set(tensors) == set(others)
    assert {name for name in tensors if not torch.equal(tensors[name], others[name])} == set()
    assert rest.items() <= other.items()


def test_a_trained_model_keeps_every_bit_through_the_released_layout(loaded_elsewhere):
    """native -> released -> native, with brackets that are not the decoder's embeddings of the marks."""
    here, _, folder = loaded_elsewhere
    before, after = (load_file(folder / name / "model.safetensors") for name in ("first", "apart"))
    table = before["decoder.model.embed_tokens.weight"]
    marks = LCLMConfig.from_pretrained(folder / "first")
    assert not torch.equal(table[[marks.memory_start_id, marks.memory_end_id]], before["brackets.weight"])
    assert set(before) == set(after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set()
    (trained, rest), (tensors, other) = here["trained"], here["apart"]
    assert all(torch.equal(value, tensors[name]) for name, value in trained.items())
    assert rest == other
    with torch.no_grad():
        reader = LCLMForConditionalGeneration.from_pretrained(folder / "released", encoder=False)
    assert torch.equal(reader.get_input_embeddings().weight, table)


def test_a_pipeline_comes_with_the_checkpoint(loaded_elsewhere):
    _, there, folder = loaded_elsewhere
    model, processor = (
        cls.from_pretrained(folder / "tiny") for cls in (LCLMForConditionalGeneration, LCLMProcessor)
    )
    inputs = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    new = model.generate(**inputs, **remote.GREEDY)[0, inputs["input_ids"].shape[1] :]
    answer = {"role": "assistant", "content": processor.tokenizer.decode(new, skip_special_tokens=True)}
    assert there["tiny"][1]["pipeline"] == [{"generated_text": [*MESSAGES, answer]}]
    plain = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    assert there["tiny"][1]["plain"] == plain("def add", return_full_text=False, **remote.GREEDY)


def test_what_a_checkpoint_carries(loaded_elsewhere):
    folder = loaded_elsewhere[2]
    source = Path(lclm.model.__file__).parent
    for case in ("tiny", "again", SHARDED):
        code = {path.name for path in (folder / case).glob("*.py")}
        assert {"configuration.py", "modeling.py", "processing.py", "pipeline.py", "spans.py"} <= code
        assert not code & {"build.py", "sources.py", "settings.py", "__init__.py"}
        for name in code:
            assert (folder / case / name).read_bytes() == (source / name).read_bytes()
        rest = {"generation_config.json", "chat_template.jinja", "processor_config.json", "tokenizer.json"}
        assert all((folder / case / name).is_file() for name in (*rest, "encoder_tokenizer/tokenizer.json"))
    generation = json.loads((folder / "tiny" / "generation_config.json").read_text())
    assert {"<|im_end|>", "<|endoftext|>"} == {
        AutoTokenizer.from_pretrained(folder / "tiny").decode(end) for end in generation["eos_token_id"]
    }
    config = json.loads((folder / "tiny" / "config.json").read_text())
    assert config == json.loads((folder / "again" / "config.json").read_text())
    assert str(folder.parent) not in json.dumps(config)
    weights = load_file(folder / "tiny" / "model.safetensors")
    again = load_file(folder / "again" / "model.safetensors")
    assert set(weights) == set(again)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_weights_are_in_shards_with_an_index(loaded_elsewhere):
    folder = loaded_elsewhere[2] / SHARDED
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        assert shard.stat().st_size < 250_000
        with safe_open(shard, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), shard.name)
    assert held == index
    assert len(set(index.values())) > 2


def test_where_lclm_is_installed_its_own_code_is_used(loaded_elsewhere):
    folder = str(loaded_elsewhere[2] / "tiny")
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(folder, **trust)) is LCLMConfig
        assert type(AutoProcessor.from_pretrained(folder, **trust)) is LCLMProcessor
        for auto in (AutoModel, AutoModelForCausalLM):
            assert type(auto.from_pretrained(folder, **trust)) is LCLMForConditionalGeneration


def test_fingerprints_are_those_of_the_weights_written(loaded_elsewhere, tmp_path):
    folder = loaded_elsewhere[2] / SHARDED
    model = LCLMForConditionalGeneration.from_pretrained(folder)
    assert model.config.fingerprints == fingerprints(model)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(other))
    again = LCLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.fingerprints == fingerprints(again) != fingerprints(model)


def test_a_writer_of_weights_gets_all_else(loaded_elsewhere, tmp_path):
    """A model without weights writes what `save_pretrained` writes beside them."""
    folder = loaded_elsewhere[2] / "tiny"
    whole = LCLMForConditionalGeneration.from_pretrained(folder)
    with torch.device("meta"):
        model = LCLMForConditionalGeneration(LCLMConfig.from_pretrained(folder))
    model.generation_config = whole.generation_config
    save_without_weights(model, tmp_path, whole.config.fingerprints)
    whole.save_pretrained(tmp_path / "whole")
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {path.name for path in (tmp_path / "whole").iterdir()} - {"model.safetensors"}
    for name in written:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
