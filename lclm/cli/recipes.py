"""`lclm recipe`: show and check recipes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lclm.cli.shared import Overrides, RecipePath, recipe


@recipe.command("show", short_help="Print the resolved recipe and count parameters.")
def recipe_show(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    parameters: Annotated[bool, typer.Option(help="Also count parameters, on meta tensors.")] = True,
) -> None:
    """Print the resolved recipe, every setting written out, and the parameters of each component.

    \b
      lclm recipe show recipes/0.6b-4b/16x.yaml
      lclm recipe show recipes/tiny.yaml model.ratios=[4] --no-parameters
    """
    from lclm.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides or [])
    typer.echo(loaded.to_yaml(), nl=False)
    if parameters:
        typer.echo("\n# parameters")
        try:
            counts = count_parameters(loaded.model)
        except ValueError as error:
            typer.echo(f"# not counted: {error}")
            return
        for name, count in {**counts, "total": sum(counts.values())}.items():
            typer.echo(f"# {name:<10}{count:>16,}")


def count_parameters(settings: Any) -> dict[str, int]:
    """Parameters of each component of a recipe's model, from meta tensors."""
    from lclm.model.build import build_model, components

    model = build_model(settings, device="meta")
    return {name: sum(p.numel() for _, p in found) for name, found in components(model).items()}


@recipe.command("validate", short_help="Check recipes without running them.")
def recipe_validate(
    recipe_paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE", help="Recipes; all shipped ones if none is named."),
    ] = None,
) -> None:
    """Check recipes without running them: keys, values, and what must hold between parts.

    \b
      lclm recipe validate my-recipe.yaml
      lclm recipe validate
    """
    from lclm.recipe import load_recipe, shipped

    for path in recipe_paths or [str(p) for p in shipped()]:
        load_recipe(path)
        typer.echo(f"valid: {path}")
