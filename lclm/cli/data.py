"""`lclm data`: build, check and look at data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lclm.cli.shared import Overrides, RecipePath, data


@data.command("build", short_help="Raw text to shards.")
def data_build(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline recipe, see recipes/data.")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Build again although it is up to date.")] = False,
) -> None:
    """Build data sets: read the sources, filter, deduplicate, split, and write webdataset shards.

    Interrupted, the same command goes on; complete and up to date, it says so and changes nothing.

    \b
      lclm data build recipes/data/stdlib.yaml
      lclm data build recipes/data/stdlib.yaml out=/scratch/stdlib executor.workers=8
    """
    from data_pipelines.build import build

    typer.echo(build(pipeline, overrides or [], fresh=fresh))


@data.command("verify", short_help="Check a data set against its checksums.")
def data_verify(
    path: Annotated[str, typer.Argument(help="A built data set, or one split of it; folder or fsspec URL.")],
) -> None:
    """Check every shard and index of a data set against its manifest's checksums.

    Example: lclm data verify data/stdlib
    """
    from lclm.data.verify import verify

    typer.echo(verify(path))


@data.command("inspect", short_help="Show samples as the model will read them.")
def data_inspect(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    task: Annotated[
        str | None, typer.Option(help="One task of the recipe; all in the mixture if left out.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="How many examples of each task.")] = 1,
) -> None:
    """Show samples the way the model will read them: what is compressed, the slots, and where loss falls.

    \b
      lclm data inspect recipes/tiny.yaml
      lclm data inspect recipes/tiny.yaml --task chat -n 3
    """
    from rich.console import Console

    from lclm.data.inspect import inspect
    from lclm.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides or [])
    console = Console(highlight=False)
    for shown in inspect(loaded.data, **reading(loaded), task=task, samples=samples):
        console.print(shown)


@data.command("budget", short_help="Propose the shape of a pack.")
def data_budget(
    recipe_path: RecipePath,
    overrides: Overrides = None,
) -> None:
    """Measure how full packs get in each stage, and propose encoder rows and latents for their positions.

    \b
      lclm data budget recipes/tiny.yaml
      lclm data budget recipes/smollm2.yaml data.pack.positions=8192
    """
    from lclm.data.budget import budget
    from lclm.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides or [])
    stages = {name: loaded.stage_data(name) for name in loaded.stages}
    typer.echo(budget(loaded.data, **reading(loaded), stages=stages))


def reading(loaded: Any) -> dict[str, Any]:
    """How a recipe's model reads text: its tokenizers, geometry, ratios and the seed of the data's order."""
    from lclm.model.build import build_config, build_processor

    config = build_config(loaded.model)
    return {
        "tokenizer": build_processor(loaded.model).spans,
        "geometry": config.geometry(),
        "ratios": config.ratios,
        "seed": loaded.seed,
    }


@data.command("tokenizer", short_help="Train a tokenizer on documents.")
def data_tokenizer(
    documents: Annotated[
        str, typer.Argument(help="A split of documents to learn from; folder or fsspec URL.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist yet.")],
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer for a model from scratch: kind=bpe, sentencepiece or bytes, with the memory marks and
    chat controls. (`lclm data build` makes one too, where the pipeline recipe has `tokenizer:`.)

    \b
      lclm data tokenizer data/stdlib/documents/train -o my-tokenizer kind=bpe vocabulary=8192
      lclm data tokenizer data/stdlib/documents/train -o my-tokenizer kind=sentencepiece vocabulary=8192
    """
    from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer
    from lclm.data.shards import DataSet
    from lclm.settings import build_settings, parse_overrides

    settings = build_settings(TokenizerSettings, [("command line", parse_overrides(overrides or []))])
    if output.exists():
        raise ValueError(f"{output}: exists already; name a folder that does not, or remove it")
    found = DataSet.open(documents)
    tokens = make_tokenizer(settings, (sample.text for sample in found if sample.text), output)
    typer.echo(f"{output}: {tokens:,} tokens")
