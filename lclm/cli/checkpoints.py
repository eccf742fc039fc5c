"""Verbs that make checkpoints, and hand them on: export, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lclm.cli.shared import app, no_loading_bars


@app.command(short_help="Write a checkpoint of a run, or convert one.")
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint in either layout.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist yet.")],
    stage: Annotated[str | None, typer.Option(help="The stage to export; the last that is complete.")] = None,
    step: Annotated[
        str | None,
        typer.Option(help="A training checkpoint instead: newest, or the number in its name."),
    ] = None,
    layout: Annotated[str, typer.Option(help="native, or released (three folders).")] = "native",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; as the run has it if left out.")
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(help="Most bytes in a file, as 4GB, which is also what is in memory at once."),
    ] = None,
) -> None:
    """Write a checkpoint that `from_pretrained` reads: safetensors, configuration, tokenizers, code.

    Of a run: what a complete stage ended with, or any training checkpoint, of any ZeRO stage and number of
    processes, also while the run goes on. Of a checkpoint: the same in another layout or precision.
    Needs no GPU, and memory for one file.

    \b
      lclm export runs/tiny -o my-model
      lclm export runs/tiny --stage joint --dtype bfloat16 -o my-model
      lclm export runs/0.6b-4b-16x --step newest -o as-of-now
      lclm export my-model --layout released -o released-model
    """
    from lclm.hub.export import check_export, export_run

    no_loading_bars(str(run))
    check_export(output, layout=layout, dtype=dtype, shard_size=shard_size)
    weights = None if step is None else training_checkpoint(run, stage, step)
    with written_bytes() as progress:
        folder = export_run(
            run,
            output,
            stage=stage,
            layout=layout,
            dtype=dtype,
            shard_size=shard_size,
            weights=weights,
            progress=progress,
        )
    typer.echo(
        f"exported: {folder}\ntry it:   lclm generate {folder} --memory README.md --prompt 'What is this?'"
    )


def training_checkpoint(run: Path, stage: str | None, step: str) -> Any:
    """The model of a run's training checkpoint. ValueError where there is none."""
    from lclm.checkpoint import RunFolder
    from lclm.recipe import Recipe
    from lclm.train.weights import open_checkpoint

    if step != "newest" and not step.isdigit():
        raise ValueError(f"--step is {step!r}; give the number of a stage's step, or newest")
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise ValueError(f"{run} is no run folder: it has no recipe.yaml. --step is for runs")
    recipe = Recipe.read(folder.recipe)
    number = None if step == "newest" else int(step)
    return open_checkpoint(recipe, folder, stage=stage, step=number, say=typer.echo)


@contextmanager
def written_bytes() -> Iterator[Callable[[int, int], None]]:
    """A bar, on a terminal, of what is written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command(short_help="Publish a run's checkpoints on the Hub.")
def publish(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or an exported checkpoint as it is.")
    ],
    repo: Annotated[str, typer.Option(help="The repository: owner/name. Made if there is none.")],
    stage: Annotated[
        str | None, typer.Option(help="The stage to publish; the last that is complete.")
    ] = None,
    all_stages: Annotated[bool, typer.Option("--all-stages", help="Every complete stage, in order.")] = False,
    layout: Annotated[str, typer.Option(help="native, or released (three folders).")] = "native",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; as the run has it if left out.")
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(help="A tag for the revision, beside its stage's name; repeatable."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    collection: Annotated[
        str | None, typer.Option(metavar="TITLE", help="Also add it to the owner's collection so called.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Of the model, as apache-2.0.")
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(help="Hub id it was made from, in place of the recipe's; repeatable."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Code of a language it is for, as en; repeatable.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Texts of the probes, and the held-out data they show, on the card.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another model there, and move tags.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, without any network.")
    ] = False,
) -> None:
    """Upload checkpoints of a run to the Hub, with a model card made of the run's facts. The same command
    goes on where an upload was cut off. The token comes from HF_TOKEN or `hf auth login`.

    \b
      lclm publish runs/tiny --repo my-name/tiny --dry-run
      lclm publish runs/0.6b-4b-16x --repo org/lclm-16x --private --licence apache-2.0 --dtype bfloat16
      lclm publish runs/0.6b-4b-16x --repo org/lclm-16x --all-stages --tag v1.0 --collection "LCLM 0.6b-4b"
    """
    from lclm.hub.metadata import CardOptions
    from lclm.hub.publish import describe, prepare
    from lclm.hub.publish import publish as upload
    from lclm.hub.remote import Remote

    def say(text: str) -> None:
        typer.echo(text, err=True)

    no_loading_bars(str(source))
    remote = Remote(repo, say)
    options = CardOptions(licence, base_model or [], language or [], samples)
    with written_bytes() as progress:
        revisions = prepare(
            source,
            repo,
            stage=stage,
            all_stages=all_stages,
            layout=layout,
            dtype=dtype,
            tags=tag or [],
            options=options,
            local=dry_run,
            progress=progress,
        )
    if dry_run:
        typer.echo(describe(revisions, remote, private=private, collection=collection))
        return
    where = upload(revisions, remote, private=private, collection=collection, overwrite=overwrite, say=say)
    typer.echo(f"published: {where}")
