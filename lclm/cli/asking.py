"""Verbs that read documents as latents: generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lclm.cli.shared import app, no_loading_bars


@app.command(short_help="Answer a prompt about documents read as latents.")
def generate(
    checkpoint: Annotated[str, typer.Argument(help="An exported folder, a released checkpoint or a Hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; text after the documents.")
    ] = None,
    memory: Annotated[
        list[Path] | None,
        typer.Option(
            "--memory", "-m", help="A text file to be read as latents; - is standard input; repeatable."
        ),
    ] = None,
    ratio: Annotated[int | None, typer.Option(help="Tokens per latent; the checkpoint's default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
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
    output; what was read goes to standard error.

    \b
      lclm generate my-model --memory report.txt --prompt "What was the profit?"
      lclm generate my-model -m a.txt -m b.txt --ratio 8 -p "How do they differ?"
      man ls | lclm generate my-model -m - -p "Which option sorts by size?"
      lclm generate runs/tiny/export --questions data/stdlib/conversations/heldout
    """
    from lclm.answer import answer, ask

    no_loading_bars(checkpoint)
    if questions is not None and prompt is None:
        ask(checkpoint, questions)
    elif prompt is not None and questions is None:
        answer(
            checkpoint,
            prompt,
            memory or [],
            ratio=ratio,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            compare=no_memory,
        )
    else:
        raise ValueError("give one of --prompt and --questions")
