"""Artifacts: what was compressed is what is read later, elsewhere, without the encoder; anything else is
refused with the reason."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lclm.model import LCLMConfig, LCLMForConditionalGeneration, LCLMProcessor
from lclm.model.artifact import _DIGEST, Artifact, Compressed, _digest
from lclm.model.text import ContentTokenizer

FIXTURES = Path(__file__).parents[1] / "conformance" / "fixtures"
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
FOX = "The quick brown fox <|memory_start|>jumps over the lazy dog. 𝄞 é\n"
GEOMETRY = {"window": 16, "overlap": 0, "pooling": "mean", "attention": "causal"}
PRINTS = {name: name[0].encode().hex() * 32 for name in ("encoder", "adapter", "decoder", "brackets")}


def load(name="mean-8x-overlap8", **options):
    folder = FIXTURES / name
    return LCLMForConditionalGeneration.from_pretrained(folder, **options), LCLMProcessor.from_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def loaded():
    return load()


def ask(processor, *memories, question="What does it say?"):
    parts = [
        {"type": "memory", "text": memory}
        if isinstance(memory, str)
        else {"type": "memory", "artifact": memory}
        for memory in memories
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def answer(model, processor, *memories, **options):
    inputs = ask(processor, *memories)
    artifacts = [memory for memory in memories if not isinstance(memory, str)]
    given = {"memories": artifacts} if artifacts else {}
    return model.generate(**inputs, **given, **GREEDY, **options)


class Rows:
    """Rows, and row tokens that are not padding, that the encoder sees."""

    def __init__(self, model):
        self.rows = 0
        self.handle = model.encoder.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.rows += next(kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs).shape[0]

    def taken(self):
        rows, self.rows = self.rows, 0
        return rows


@pytest.fixture
def rows(loaded):
    watch = Rows(loaded[0])
    yield watch
    watch.handle.remove()


def small(seed=0, memories=2, name="a"):
    """An artifact without a model, of `memories` memories of 5 and 6 and ... latents of 3 numbers."""
    random = torch.Generator().manual_seed(seed)
    made = tuple(
        Compressed(f"{name}{i}", PRINTS["encoder"], 99, 4 * (5 + i), 5 + i, 4, "MIT" if i else None)
        for i in range(memories)
    )
    sizes = [memory.latents for memory in made]
    windows = sum(-(-memory.tokens // 16) for memory in made)
    return Artifact(
        torch.randn(sum(sizes), 3, generator=random),
        made,
        torch.cat([torch.arange(size) * 7 for size in sizes]),
        torch.randint(0, 256, (windows, 32), generator=random, dtype=torch.uint8),
        dict(PRINTS),
        dict(GEOMETRY),
    )


def same(one, other):
    return (
        torch.equal(one.latents, other.latents)
        and one.latents.dtype == other.latents.dtype
        and torch.equal(one.starts, other.starts)
        and torch.equal(one.windows, other.windows)
        and (one.memories, one.fingerprints, one.geometry)
        == (other.memories, other.fingerprints, other.geometry)
    )


@pytest.mark.parametrize("name", ["mean-8x-overlap8", "concat-4x", "eos-8x"])
def test_reads_as_the_text_does(name):
    model, processor = load(name)
    text = FOX * 12
    artifact = model.compress(processor, text, names="fox.txt", licence="MIT")
    inputs, plain = ask(processor, artifact), ask(processor, text)
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert len(inputs["encoder_input_ids"]) == 0 and inputs["memory_ready"].tolist() == [1]
    (direct,) = model.encode_memories(**plain)
    assert (artifact.latents - direct).abs().max() < 1e-5
    assert torch.equal(answer(model, processor, artifact), answer(model, processor, text))
    (memory,) = artifact.memories
    tokens = int((plain["block_index"] >= 0).sum()) if name != "eos-8x" else memory.tokens
    assert dataclasses.astuple(memory)[2:] == (
        len(text),
        tokens,
        -(-tokens // model.config.ratio),
        model.config.ratio,
        "MIT",
    )


def test_artifacts_and_texts_mix_in_batches_and_beams(loaded, rows):
    model, processor = loaded
    texts = [FOX * 3, "def add(a, b): return a + b\n" * 4, "x = 1\n" * 30]
    first, second = model.compress(processor, texts[:2]), model.compress(processor, texts[2], ratio=8)
    rows.taken()
    mixed = answer(model, processor, first, texts[2], second, num_beams=2)
    assert 0 < rows.taken() <= len(ask(processor, texts[2])["encoder_input_ids"])
    assert torch.equal(mixed, answer(model, processor, *texts[:2], texts[2], texts[2], num_beams=2))
    conversations = [
        [{"role": "user", "content": [{"type": "memory", "artifact": part}, {"type": "text", "text": "?"}]}]
        for part in (second, first)
    ]
    batch = processor.apply_chat_template(conversations, add_generation_prompt=True)
    together = model.generate(**batch, memories=[second, first], **GREEDY)
    assert rows.taken() == len(ask(processor, *texts[:2], texts[2], texts[2])["encoder_input_ids"])
    for number, part in enumerate((second, first)):
        inputs = processor.apply_chat_template(conversations[number], add_generation_prompt=True)
        alone = model.generate(**inputs, memories=[part], **GREEDY)
        assert torch.equal(alone[0, -12:], together[number, -12:])


def test_concatenated_reads_as_both_and_can_be_taken_apart(loaded):
    model, processor = loaded
    texts = [FOX * 3, "def add(a, b): return a + b\n" * 4]
    parts = [model.compress(processor, text, names=[text[:3]]) for text in texts]
    whole = Artifact.concatenate(parts)
    assert torch.equal(answer(model, processor, whole), answer(model, processor, *texts))
    both = model.compress(processor, texts, names=["The", "def"])
    assert both.memories == whole.memories and torch.equal(both.starts, whole.starts)
    assert torch.equal(both.windows, whole.windows) and (both.latents - whole.latents).abs().max() < 1e-5
    assert same(whole.select(1), parts[1]) and same(whole.select([0, -1]), whole)
    swapped = answer(model, processor, whole.select([1, 0]))
    assert torch.equal(swapped, answer(model, processor, *texts[::-1]))
    with pytest.raises(ValueError, match=r"cannot select the memories \[2\] of an artifact that holds 2"):
        whole.select(2)
    mixed = Artifact.concatenate([small(), dataclasses.replace(small(), latents=small().latents.bfloat16())])
    assert mixed.latents.dtype == torch.float32 and len(mixed) == 4
    with pytest.raises(ValueError, match=r"artifact 2 cannot be joined with the first: .* another encoder"):
        Artifact.concatenate([small(), parts[0]])


def test_copied_elsewhere_a_fresh_process_answers_the_same_without_an_encoder(tmp_path):
    model, processor = load()
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    artifact = model.compress(processor, FOX * 9, names="fox.txt")
    artifact.save(tmp_path / "here.lclm")
    shutil.copy(tmp_path / "here.lclm", tmp_path / "elsewhere.lclm")
    code = """
import sys, torch
from lclm.model import LCLMForConditionalGeneration, LCLMProcessor
from lclm.model.artifact import Artifact
model = LCLMForConditionalGeneration.from_pretrained(sys.argv[1], encoder=False)
processor = LCLMProcessor.from_pretrained(sys.argv[1])
artifact = Artifact.load(sys.argv[2])
parts = [{"type": "memory", "artifact": artifact}, {"type": "text", "text": "What does it say?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
out = model.generate(**inputs, memories=[artifact], **greedy)
assert model.encoder is None and model.adapter is None
assert not [name for name in model.state_dict() if name.startswith(("encoder", "adapter"))]
print(out[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "elsewhere.lclm")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == answer(model, processor, FOX * 9)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_the_models_and_fingerprints_are_not(dtype, tmp_path):
    model, processor = load("mean-16x-w64", dtype=dtype)
    artifact = model.compress(processor, FOX * 9)
    artifact.save(tmp_path / "a.lclm")
    again = Artifact.load(tmp_path / "a.lclm")
    assert again.latents.dtype == dtype and same(again, artifact)
    other, _ = load("mean-16x-w64", dtype=torch.float32, encoder=False)
    assert answer(other, processor, again).shape[1] > 12
    if dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"holds torch.bfloat16, this model computes in torch.float32"):
            load("mean-16x-w64")[0].compress(processor, FOX, previous=again)


def test_a_growing_text_encodes_its_end_only(loaded, rows):
    model, processor = loaded
    lines = [f"line {number} of a text that grows\n" for number in range(60)]
    before = model.compress(processor, "".join(lines[:50]))
    windows = len(before.windows)
    assert rows.taken() > 1
    seen = []
    after = model.compress(
        processor, "".join(lines), previous=before, progress=lambda *counts: seen.append(counts)
    )
    known, total = seen[0]
    taken, full = rows.taken(), model.compress(processor, "".join(lines))
    assert windows - 2 <= known < windows and seen[-1] == (total, total) == (len(full.windows),) * 2
    assert 0 < taken <= total - known < rows.taken() / 3
    assert_equal_but_for_rounding(after, full)
    assert same(model.compress(processor, "".join(lines), previous=full), full) and rows.taken() == 0


def test_an_insertion_encodes_from_there(loaded, rows):
    model, processor = loaded
    lines = [f"line {number} of a text that changes\n" for number in range(60)]
    before = model.compress(processor, "".join(lines))
    lines.insert(45, "and one more\n")
    rows.taken()
    after = model.compress(processor, "".join(lines), previous=before)
    taken, full = rows.taken(), model.compress(processor, "".join(lines))
    assert 0.1 < taken / rows.taken() < 0.5
    assert_equal_but_for_rounding(after, full)
    changed = (after.windows[: len(before.windows)] != before.windows[: len(after.windows)]).any(1)
    first = int(changed.nonzero()[0])
    assert bool(changed[first:].all()) and 0.6 < first / len(changed) < 0.85


def assert_equal_but_for_rounding(one, other):
    assert (one.latents - other.latents).abs().max() < 1e-5
    assert torch.equal(one.starts, other.starts) and torch.equal(one.windows, other.windows)
    assert (one.memories, one.fingerprints) == (other.memories, other.fingerprints)


@pytest.mark.parametrize(
    "choice",
    [
        {"adapter": "mlp_attn", "adapter_layers": 1},
        {"adapter": "attn_mlp", "pooling": "concat"},
        {"encoder_attention": "bidirectional", "overlap": 4, "ratios": [2, 4]},
        {"position_in_block": True, "ratios": [2, 4]},
    ],
    ids=str,
)
def test_every_kind_of_model(choice, tiny, loaded):
    """Full, in groups of rows, and from a previous artifact; attention adapters encode all again."""
    processor = loaded[1]
    parts = {
        "encoder_config": {**tiny.encoders["qwen3"], "vocab_size": 703},
        "decoder_config": {**tiny.decoder, "vocab_size": 703},
    }
    marks = {"memory_start_id": 700, "memory_end_id": 701, "memory_id": 702}
    config = LCLMConfig(**parts, **{"ratio": 4, "window": 16, **tiny.ids, **marks, **choice})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LCLMForConditionalGeneration(config).eval()
    own = LCLMProcessor(processor.tokenizer, processor.encoder_tokenizer, model.config.geometry())
    for ratio in model.config.ratios:
        before = model.compress(own, [FOX * 3, FOX], ratio=ratio)
        watch = Rows(model)
        texts = [FOX * 3 + "more", FOX]
        after = model.compress(own, texts, ratio=ratio, previous=before)
        taken = watch.taken()
        model.config.max_rows_per_forward = 1
        full = model.compress(own, texts, ratio=ratio)
        model.config.max_rows_per_forward = None
        assert (taken == watch.taken()) == (model.config.adapter != "mlp")
        watch.handle.remove()
        assert_equal_but_for_rounding(after, full)
        parts = [{"type": "memory", "text": text, "ratio": ratio} for text in texts]
        inputs = own.apply_chat_template([{"role": "user", "content": parts}])
        assert (full.latents - torch.cat(model.encode_memories(**inputs))).abs().max() < 1e-5


def test_starts_are_characters_of_the_source(loaded):
    model, processor = loaded
    text = "a é € 𝄞 <|memory|> def f(x):\n\treturn x " * 9
    artifact = model.compress(processor, text)
    content = processor.spans.encoder_content
    ids, first = content.encode(text), 0
    for number, start in enumerate(artifact.starts.tolist()):
        read = content.decode(ids[: number * model.config.ratio]).rstrip("\ufffd")
        assert (
            text.startswith(read.rstrip("\ufffd")) and start == len(read.rstrip("\ufffd")) and start >= first
        )
        first = start
    changing = Tokenizer(models.WordLevel({"[UNK]": 0, "ae": 1, "b": 2}, unk_token="[UNK]"))
    changing.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Prepend("b ")]
    )
    changing.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, places = ContentTokenizer(changing).encode_with_places("ÀÉ  ｂ ÀÉ")
    assert ids.tolist() == [2, 1, 2, 1] and places.tolist() == [0, 0, 4, 6]


def test_another_model_is_refused_with_the_reason(loaded):
    model, processor = loaded
    artifact = model.compress(processor, FOX)
    inputs = ask(processor, artifact)
    for name, part in (("adapter", model.adapter), ("decoder", model.decoder), ("brackets", model.brackets)):
        weight = next(part.parameters())
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[0] += 1
        try:
            with pytest.raises(ValueError, match=rf"memories\[0\] cannot be read .* another {name}"):
                model.generate(**inputs, memories=[artifact], **GREEDY)
            with pytest.raises(ValueError, match=f"`previous` cannot be read .* another {name}"):
                model.compress(processor, FOX, previous=artifact)
        finally:
            with torch.no_grad():
                weight.copy_(kept)
    model.check_artifact(artifact)
    for name, other in {"window": 64, "overlap": 4, "attention": "bidirectional", "pooling": "eos"}.items():
        geometry = {**artifact.geometry, name: other}
        windows = (
            artifact.windows
            if name != "window"
            else artifact.windows[: -(-artifact.memories[0].tokens // 64)]
        )
        changed = dataclasses.replace(artifact, geometry=geometry, windows=windows)
        with pytest.raises(ValueError, match=f"made with {name} {other!r}, here it is"):
            model.check_artifact(changed)
    with pytest.raises(ValueError, match="latents of 3 numbers"):
        model.check_artifact(small())


def test_fingerprints_come_from_the_checkpoint_while_nothing_changed(loaded, tmp_path, monkeypatch):
    model = loaded[0]
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())["fingerprints"]
    assert stated == model.fingerprints() != {}
    monkeypatch.setattr("lclm.model.compression.fingerprints", None)
    again = LCLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.fingerprints() == stated
    monkeypatch.undo()
    again.brackets.weight.data += 1
    changed = again.fingerprints()
    assert changed.pop("brackets") != stated["brackets"] and changed.items() <= stated.items()
    released = LCLMForConditionalGeneration.from_pretrained(FIXTURES / "mean-8x-overlap8", encoder=False)
    assert released.fingerprints() == stated
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fingerprints"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = LCLMForConditionalGeneration.from_pretrained(tmp_path, encoder=False)
    assert older.encoder is None and older.fingerprints() == stated


def test_what_generate_refuses_before_any_work(loaded, rows):
    model, processor = loaded
    artifact = model.compress(processor, FOX)
    other = model.compress(processor, FOX * 2)
    inputs, plain = ask(processor, artifact), ask(processor, FOX)
    rows.taken()
    for wrong, message in (
        ({}, "take 1 memories .* has none"),
        ({"memories": [artifact, artifact]}, "has 2 memories"),
        ({"memories": [other]}, r"take 1 memories \(\d+ latents\), but `memories` has 1 memories"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **wrong)
    with pytest.raises(ValueError, match="take none, but"):
        model.generate(**plain, memories=[artifact])
    with pytest.raises(ValueError, match="memories of artifacts need `latents`"):
        model(**inputs)
    for text in ("<|memory_start|>ab<|memory_end|>c", "a<|memory|>", "<|memory_end|>", "<|memory_start|>"):
        with pytest.raises(ValueError, match="memory marks or slots without latents"):
            model.generate(**processor.tokenizer(text, return_tensors="pt"), **GREEDY)
    with pytest.raises(ValueError, match="memory marks or slots without latents"):
        ids = torch.cat([plain["input_ids"], torch.tensor([[700]])], 1)
        index = torch.nn.functional.pad(plain["latent_index"], (0, 1), value=-1)
        model.generate(**{**plain, "input_ids": ids, "latent_index": index}, **GREEDY)
    assert rows.taken() == 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "memory", "artifact": "doc.lclm"}, "has a str as its artifact"),
        ({"type": "memory", "artifact": small(), "ratio": 4}, "'ratio' beside an artifact"),
        ({"type": "memory", "artifact": small(), "text": "a"}, "'text' beside an artifact"),
        ({"type": "text", "artifact": small()}, "unknown key 'artifact'"),
    ],
)
def test_bad_artifact_parts(part, message, loaded):
    with pytest.raises(ValueError, match=message):
        loaded[1].apply_chat_template([{"role": "user", "content": [part]}])


def test_what_compress_refuses(loaded, rows):
    model, processor = loaded
    rows.taken()
    for arguments, message in (
        ((["a", ""],), "memory 2: is empty"),
        (([],), "0 texts"),
        ((["a", "b"], {"names": ["one"]}), "2 texts and 1 names"),
        (("a", {"ratio": 5}), "ratio 5 does not divide"),
        (("a", {"names": "x" * 5000}), "name is not Unicode text"),
        (("a", {"names": "file\udcff"}), "name is not Unicode text"),
        (("a\ud800",), "lone surrogate"),
    ):
        options = arguments[1] if len(arguments) > 1 else {}
        with pytest.raises(ValueError, match=message):
            model.compress(processor, arguments[0], **options)
    assert rows.taken() == 0
    bare = LCLMForConditionalGeneration.from_pretrained(FIXTURES / "mean-4x", encoder=False)
    with pytest.raises(ValueError, match="encoder=False"):
        bare.compress(processor, "a")


# files


@pytest.fixture
def saved(tmp_path):
    small().save(tmp_path / "a.lclm")
    return tmp_path / "a.lclm"


def refused(path):
    try:
        Artifact.load(path)
    except ValueError as error:
        return str(path) in str(error) and ("is damaged" in str(error) or "is no artifact" in str(error))
    return False


def test_a_file_is_a_function_of_the_artifact_and_is_replaced_whole(saved, monkeypatch):
    before = saved.read_bytes()
    assert same(Artifact.load(saved), small())
    small().save(saved)
    assert saved.read_bytes() == before
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        small(seed=1).save(saved)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == ["a.lclm"]


def test_a_flipped_byte_anywhere_is_found(saved):
    """Every byte of the file: each of its bits, and all at once."""
    data = saved.read_bytes()
    with saved.open("r+b", buffering=0) as file:
        for place in range(len(data)):
            for flip in (*(1 << bit for bit in range(8)), 0xFF):
                os.pwrite(file.fileno(), bytes([data[place] ^ flip]), place)
                assert refused(saved), (place, flip)
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert same(Artifact.load(saved), small())


def test_cut_or_longer_files_are_found(saved):
    data = saved.read_bytes()
    for more in (b"\0", b"\0" * 64, data):
        saved.write_bytes(data + more)
        assert refused(saved)
    saved.write_bytes(data)
    for length in reversed(range(len(data))):
        os.truncate(saved, length)
        assert refused(saved), length


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.integers(0, 3000),
    removed=st.integers(0, 400),
    put=st.binary(max_size=400),
    digest=st.booleans(),
)
def test_no_bytes_crash_the_reader(saved, start, removed, put, digest):
    """Also where the digest was made to fit."""
    small().save(saved)
    data = saved.read_bytes()
    start = start % len(data)
    changed = data[:start] + put + data[start + removed :]
    if digest and len(changed) > _DIGEST.stop:
        changed = changed[: _DIGEST.start] + _digest(changed) + changed[_DIGEST.stop :]
    saved.write_bytes(changed)
    try:
        assert changed == data or same(Artifact.load(saved), small()) or digest
    except ValueError as error:
        assert str(saved) in str(error) and len(str(error)) < 1000


def rewritten(path, old, new):
    """The file with a part of its header replaced by one of the same length, and a digest that fits."""
    data = path.read_bytes()
    old, new = (json.dumps(text)[1:-1].encode() for text in (old, new))
    assert data.count(old) >= 1
    data = data.replace(old, new.ljust(len(old)), 1)
    path.write_bytes(data[: _DIGEST.start] + _digest(data) + data[_DIGEST.stop :])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 2', r"has the schema 2, but this version of lclm reads up to 1"),
        ('"schema": 1', '"schema":""', "has the schema"),
        ('"schema": 1', '"scheme": 1', "header cannot be read"),
        ('"latents": 5', '"latents": 6', "6 latents for 20 tokens"),
        ('"ratio": 4', '"ratio": 0', "ratio is '0'"),
        ('"ratio": 4', '"ratio":-4', "ratio is '-4'"),
        ('"tokens": 20', '"tokens":1e9', "tokens is"),
        ('"characters": 99', '"characters":9.9', "characters is"),
        ('"characters": 99', '"characters": 28', "do not lie in its 28 characters"),
        ('"window": 16', '"window": 1 ', "windows are"),
        ('"window": 16', '"window": 0 ', "window is 0"),
        ('"name": "a0"', '"name": 1234', "name is no"),
        ('"name": "a0"', '"nama": "a0"', "cannot be read"),
        ('"adapter": "61', '"adapter": "6X', "fingerprints must be"),
        ('"pooling": "mean"', '"pooling": 123456', "pooling is"),
    ],
)
def test_a_header_that_lies_is_refused(saved, old, new, message):
    rewritten(saved, old, new)
    with pytest.raises(ValueError, match=message):
        Artifact.load(saved)


def test_files_that_are_no_artifacts(tmp_path):
    for number, content in enumerate((b"", b"text\n" * 99, b"\xff" * 99, b"\xff" * 7 + b"\x7f{")):
        path = tmp_path / f"{number}.lclm"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"\d.lclm is no artifact"):
            Artifact.load(path)
    with pytest.raises(ValueError, match="is no artifact"):
        Artifact.load(FIXTURES / "mean-4x" / "adapter" / "adapter.safetensors")
    with pytest.raises(FileNotFoundError):
        Artifact.load(tmp_path / "none.lclm")
    with pytest.raises(ValueError, match="not finite"):
        dataclasses.replace(small(), latents=small().latents * torch.inf)
