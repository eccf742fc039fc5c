"""The command itself, and what its verbs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=HELP)
recipe = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=HELP)
app.add_typer(data, name="data", help="Build, check and look at data sets.")
app.add_typer(recipe, name="recipe", help="Show and check recipes.")

RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, as in train.log_every=5."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (the recipe's run_dir).")]


@app.callback()
def lclm(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Latent Context Language Models: from raw text to a model that reads long contexts as latents.

    \b
      lclm data build recipes/data/stdlib.yaml       raw text -> shards
      lclm data inspect recipes/tiny.yaml            a sample as the model will read it
      lclm recipe show recipes/tiny.yaml             everything a run will do
      lclm plan recipes/0.6b-4b/16x.yaml --nodes 32  what a run will take
      lclm train recipes/tiny.yaml                   train, or go on where it stopped
      lclm report runs/tiny                          a page with plots
      lclm export runs/tiny -o my-model              a checkpoint that from_pretrained reads
      lclm generate my-model --memory book.txt --prompt "Who dies first?"
      lclm chat my-model --memory notes/             any number of questions
      lclm compress book.txt -o book.lclm --model my-model
      lclm publish runs/tiny --repo me/tiny --dry-run
    """


def no_loading_bars(*sources: str | None) -> None:
    """Switch off bars for loading and saving weights, unless some are to be fetched from the hub."""
    if all(source is None or source.startswith("package:") or Path(source).exists() for source in sources):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
