"""Verbs that read documents as latents: generate, chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lclm.cli.shared import app, no_loading_bars

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="An exported folder, a released checkpoint or a Hub id.")
]
Memory = Annotated[
    list[str] | None,
    typer.Option(
        "--memory",
        "-m",
        metavar="PATH",
        help="What to read as latents: a file, folder, glob or artifact (.lclm), or - for standard input; "
        "repeatable.",
    ),
]
Ratio = Annotated[int | None, typer.Option(min=1, help="Tokens per latent; the checkpoint's default.")]
MaxNewTokens = Annotated[int, typer.Option(help="Stop an answer after so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")]
Seed = Annotated[int, typer.Option(help="For a temperature above 0.")]
System = Annotated[str | None, typer.Option(help="What to tell the model before everything else.")]


@app.command(short_help="Answer a prompt about documents read as latents.")
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; text after the documents.")
    ] = None,
    memory: Memory = None,
    ratio: Ratio = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    system: System = None,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Also answer without the documents.")
    ] = False,
    questions: Annotated[
        str | None,
        typer.Option(
            help="Instead of a prompt: ask what this conversations data set asks, and show the truth."
        ),
    ] = None,
) -> None:
    """Answer a prompt about documents that the model reads as latents only. The answer streams to standard
    output; what was read, and how fast, goes to standard error.

    \b
      lclm generate my-model --memory report.txt --prompt "What was the profit?"
      lclm generate my-model -m a.txt -m 'notes/*.md' --ratio 8 -p "How do they differ?"
      lclm generate my-model -m src/ -p "Where are files opened?"
      man ls | lclm generate my-model -m - -p "Which option sorts by size?"
      lclm generate my-model -m book.lclm -p "Who dies first?"      (the encoder is not loaded)
      lclm generate runs/tiny/export --questions data/stdlib/conversations/heldout

    In folders and globs, what is hidden, binary, empty or not UTF-8 is left out, and named.
    """
    if (prompt is None) == (questions is None):
        raise ValueError("give one of --prompt and --questions")
    no_loading_bars(checkpoint)
    if questions is not None:
        ask_questions(checkpoint, questions)
        return
    from lclm.ask.documents import find_documents

    documents = find_documents(memory or [], to_standard_error)
    from lclm.ask.answer import answer
    from lclm.ask.reader import Sampling

    answer(
        checkpoint,
        str(prompt),
        documents,
        sampling=Sampling(max_new_tokens, temperature),
        system=system,
        ratio=ratio,
        seed=seed,
        compare=no_memory,
    )


@app.command(short_help="Talk about documents read as latents.")
def chat(
    checkpoint: Checkpoint,
    memory: Memory = None,
    ratio: Ratio = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    system: System = None,
) -> None:
    """Talk about documents. They are compressed once, whatever the number of questions; what the decoder has
    read is kept from question to question.

    \b
      lclm chat my-model -m report.txt
      lclm chat my-model -m notes/ -m 'src/**/*.py' --system "Answer in one sentence."
      lclm chat my-model -m book.lclm < questions.txt > answers.txt

    At a terminal, Ctrl-C stops an answer and Ctrl-D ends the chat. From a pipe, each line is a question.
    Lines that begin with a slash are commands: /documents, /add FILE, /save FILE.lclm, /reset, /quit; /help
    explains them. Answers go to standard output, all else to standard error.
    """
    if "-" in (memory or []):
        raise ValueError(
            "the questions of a chat come from standard input, so a document cannot: write it to a file first"
        )
    no_loading_bars(checkpoint)
    from lclm.ask.documents import find_documents

    documents = find_documents(memory or [], to_standard_error)
    from lclm.ask.reader import Sampling
    from lclm.ask.talk import talk

    sampling = Sampling(max_new_tokens, temperature)
    talk(checkpoint, documents, sampling=sampling, system=system, ratio=ratio, seed=seed)


def to_standard_error(text: str) -> None:
    typer.echo(text, err=True)


def ask_questions(checkpoint: str, data_set: str, count: int = 3) -> None:
    """Ask `count` questions of a conversations data set, spread over it."""
    from lclm.data.shards import DataSet

    data = DataSet.open(data_set)
    if data.kind != "conversations":
        raise ValueError(f"{data_set}: holds {data.kind}; name a split of conversations")
    from lclm.ask.answer import ask

    if not ask(checkpoint, conversations(data, count)):
        raise ValueError(f"{data_set}: none of {count} conversations has memory; nothing to ask")


def conversations(data: Any, count: int) -> Iterator[list[dict[str, Any]]]:
    """Messages of `count` samples of a data set, spread over it."""
    for number in range(count):
        shard, start = data.locate(number * data.num_samples // count)
        yield data.read(shard, start, start + 1)[0].messages or []
