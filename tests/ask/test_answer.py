"""`lclm generate`: what it reads, what it shows where, and that it answers as the model does."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lclm.ask.figures import Figures, Read
from lclm.data.shards import Sample, ShardWriter, write_manifest
from lclm.model import LCLMForConditionalGeneration, LCLMProcessor

FEW = ("--max-new-tokens", "6")


def test_answers_as_the_model_does_with_figures_beside(
    lclm: Callable[..., Any], folder: Path, checkpoint: str
) -> None:
    out, err = lclm(
        "generate", "-m", "docs/*.txt", "-m", "docs", "-m", "-", "-p", "What?", *FEW, typed="typed"
    )
    model = LCLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = LCLMProcessor.from_pretrained(checkpoint)
    texts = [(folder / "fox.txt").read_text(), (folder / "add.py").read_text(), "typed"]
    parts = [{"type": "memory", "text": text} for text in texts] + [{"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out == processor.tokenizer.decode(ids, skip_special_tokens=True) + "\n"

    assert "left out 1 binary (docs/logo.png)" in err
    tokens = [len(processor.spans.encoder_content.encode(text)) for text in texts]
    latents = sum(-(-count // 4) for count in tokens)
    slots = int((inputs["latent_index"] >= 0).sum())
    plain = inputs["input_ids"].shape[1] - slots
    read = f"read {sum(tokens):,} tokens of 3 documents as {latents:,} latents (4x)"
    assert latents == slots and f"{read} in " in err
    figures = rf"{re.escape(read)} and {plain} as they are; first token after \d+\.\d\d s \(.* compressing\)"
    assert re.search(rf"{figures}, {len(ids)} tokens at [\d,.]+ tokens/s", err)


def test_greedy_answers_repeat_and_sampled_ones_follow_the_seed(
    lclm: Callable[..., Any], folder: Path
) -> None:
    def once(*options: str) -> str:
        return lclm("generate", "-m", "docs/fox.txt", "-p", "What?", *FEW, *options)[0]

    assert once() == once()
    assert once("--temperature", "2", "--seed", "1") == once("--temperature", "2", "--seed", "1")


def test_without_documents_the_encoder_is_not_loaded(
    lclm: Callable[..., Any], folder: Path, loads: Any
) -> None:
    alone, err = lclm("generate", "-p", "What?", *FEW)
    assert loads.encoders == [False] and re.search(r"^read \d+ as they are; first token after", err)
    out, err = lclm("generate", "-m", "docs/fox.txt", "-p", "What?", "--no-memory", *FEW)
    assert out.endswith(alone) and out != alone and "without the documents:" in err
    assert loads.encoders == [False, True] and len(loads.rows) == 1


def test_questions_of_a_data_set(lclm: Callable[..., Any], tmp_path: Path) -> None:
    memory = {"type": "memory", "text": "abc " * 9}
    messages = [
        {"role": "user", "content": [memory, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "abc"},
    ]
    with ShardWriter(str(tmp_path), kind="conversations") as writer:
        for number in range(4):
            writer.write(Sample(key=f"sample-{number}", messages=messages))
    write_manifest(str(tmp_path), name="x", kind="conversations", split="heldout", shards=writer.shards)
    shown, _ = lclm("generate", "--questions", str(tmp_path))
    assert shown.count("question: what?") == shown.count("true: abc") == 3
    assert len(re.findall(r"\(from \d+ latents\)\n", shown)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "docs/none.txt", "-p", "x"], "there is no such file"),
        (["-m", "docs/logo.png", "-p", "x"], "binary"),
        (["-m", "docs", "-p", "x", "--max-new-tokens", "9000"], "the decoder has 4,096 positions; raise"),
        (["-p", "x", "--max-new-tokens", "9000"], "more than the 4,096 of the decoder"),
        (["-m", "docs", "-p", "x", "--ratio", "7"], "ratio"),
        (["-p", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["-p", "x", "--questions", "y"], "give one of --prompt and --questions"),
    ],
)
def test_errors_say_what_to_do(
    lclm: Callable[..., Any], folder: Path, arguments: list[str], message: str
) -> None:
    out, err = lclm("generate", *arguments, code=2)
    assert out == "" and message in " ".join(err.replace("│", " ").split()) and "Traceback" not in err


def test_what_is_no_checkpoint_is_said_before_anything_is_loaded(
    lclm: Callable[..., Any], folder: Path
) -> None:
    (folder / "export").mkdir()
    for place, message in {
        "docs/export": "it holds no config.json or model_config.json",
        "docs": "this run's is docs/export",
        "./nowhere": "there is no such folder, and a Hub id is of the form owner/name",
        "nowhere": "there is no such folder",
    }.items():
        out, err = lclm("generate", "-p", "x", checkpoint=place, code=2)
        assert out == "" and message in " ".join(err.replace("│", " ").split()) and "Traceback" not in err
        (folder / "export" / "config.json").write_text("{}")


def test_streams_to_a_process_that_reads_and_ends_at_ctrl_c(folder: Path, checkpoint: str) -> None:
    arguments = ["generate", checkpoint, "-m", "-", "-p", "Go on."]
    process = subprocess.Popen(
        [sys.executable, "-m", "lclm", *arguments, "--max-new-tokens", "3000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's jobs ignore it
    )
    assert process.stdin and process.stdout
    process.stdin.write(b"A document from a pipe. " * 20)
    process.stdin.close()
    process.stdin = None
    assert process.stdout.read(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out.endswith(b"\n")
    assert b"Traceback" not in err and re.search(rb"first token after .*, \d+ token", err)


def test_figures_in_words() -> None:
    read = Read(documents=2, tokens=1030, latents=129, ratio=None)
    assert str(read) == "1,030 tokens of 2 documents as 129 latents (8.0x)"
    shown = Figures(read, text=20, kept=100, tokens=11, first=0.5, last=2.5, cut=True).line(compressing=1.0)
    assert shown == (
        "read 1,030 tokens of 2 documents as 129 latents (8.0x) and 20 as they are, 100 positions kept; "
        "first token after 1.50 s (1.00 s of it compressing), 11 tokens at 5.0 tokens/s, cut by "
        "--max-new-tokens"
    )
    assert Figures(None, 20, 0, 0, None, None, False).line() == "read 20 as they are; no token came"
