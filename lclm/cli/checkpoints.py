"""Verbs that make checkpoints: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lclm.cli.shared import Run, app, no_loading_bars


@app.command(short_help="Write a checkpoint of a run.")
def export(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist yet.")],
    stage: Annotated[str | None, typer.Option(help="The stage to export; the last that is complete.")] = None,
    layout: Annotated[str, typer.Option(help="native, or released (three folders).")] = "native",
) -> None:
    """Write a checkpoint of a run that `from_pretrained` reads: safetensors, configuration, tokenizers.

    \b
      lclm export runs/tiny -o my-model
      lclm export runs/tiny --stage joint -o my-model
      lclm export runs/0.6b-4b-16x --layout released -o my-model
    """
    from lclm.hub.export import export_run

    no_loading_bars(str(run))
    folder = export_run(run, output, stage=stage, layout=layout)
    typer.echo(
        f"exported: {folder}\ntry it:   lclm generate {folder} --memory README.md --prompt 'What is this?'"
    )
