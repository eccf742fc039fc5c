"""The verb that writes artifacts: compress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lclm.cli.shared import app, no_loading_bars


@app.command(short_help="Compress documents into a file that `generate` and `chat` read.")
def compress(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Files, folders, globs, or - for standard input; artifacts (.lclm) are joined as they are.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact to write: NAME.lclm.")],
    model: Annotated[
        str, typer.Option(metavar="CHECKPOINT", help="An exported folder, a released checkpoint or a Hub id.")
    ],
    ratio: Annotated[int | None, typer.Option(help="Tokens per latent; the checkpoint's default.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="The documents' licence, to be noted in the artifact.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Encode all, whatever the output holds.")] = False,
) -> None:
    """Compress documents into one artifact: their latents, which the same checkpoint reads later without its
    encoder. When the output is there already, only what changed is encoded.

    \b
      lclm compress report.txt -o report.lclm --model my-model
      lclm compress src/ 'notes/*.md' -o all.lclm --model my-model --licence MIT
      lclm compress a.lclm b.lclm -o both.lclm --model my-model
      lclm generate my-model -m report.lclm -p "What was the profit?"
    """
    no_loading_bars(model)
    from lclm.ask.documents import find_documents

    documents = find_documents(files, lambda line: typer.echo(line, err=True))
    from lclm.memory.compress import check_output

    check_output(output, documents)
    from lclm.ask.figures import progress_bar
    from lclm.ask.reader import Reader
    from lclm.memory.compress import compress as write

    reader = Reader(model)
    texts = any(document.text is not None for document in documents)
    with progress_bar("compressing") as progress:
        written = write(
            reader.model(encoder=texts),
            reader.processor,
            documents,
            output,
            ratio=ratio,
            licence=licence,
            fresh=fresh,
            progress=progress,
        )
    typer.echo(f"{output}: {written}", err=True)
