"""`lclm generate` on a small released checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from lclm.cli import main
from lclm.data.shards import Sample, ShardWriter, write_manifest

CHECKPOINT = str(Path(__file__).parent / "conformance" / "fixtures" / "mean-4x")


def generate(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", CHECKPOINT, *arguments])
    assert stopped.value.code == 0


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "document.txt"
    file.write_text("The <|memory_start|>quick brown fox\njumps over the lazy dog. " * 4)
    return file


def test_an_answer_streams_and_says_what_was_read(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("-m", str(document), "-p", "What jumps?", "--max-new-tokens", "5", "--no-memory")
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert "latents and" in shown.err and "without the documents:" in shown.err
    words = shown.err.replace(",", "").split()
    tokens, latents = int(words[words.index("read") + 1]), int(words[words.index("as") + 1])
    assert latents == -(-tokens // 4)


def test_greedy_answers_repeat_and_sampled_ones_follow_the_seed(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(*options: str) -> str:
        generate("-m", str(document), "-p", "What?", "--max-new-tokens", "8", *options)
        return capsys.readouterr().out

    assert once() == once()
    assert once("--temperature", "2", "--seed", "1") == once("--temperature", "2", "--seed", "1")


def test_questions_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "memory", "text": "abc " * 9}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": "abc"},
    ]
    with ShardWriter(str(tmp_path), kind="conversations") as writer:
        for number in range(4):
            writer.write(Sample(key=f"sample-{number}", messages=messages))
    write_manifest(str(tmp_path), name="x", kind="conversations", split="heldout", shards=writer.shards)
    generate("--questions", str(tmp_path))
    shown = capsys.readouterr().out
    assert shown.count("question: what?") == 3 and "true: abc" in shown and "latents)" in shown


def test_a_folder_that_is_no_checkpoint(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(document.parent), "-m", str(document), "-p", "x"])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
