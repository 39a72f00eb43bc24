"""`dpo config`: print recipes, their JSON schema, and the settings of clusters."""

from typing import Annotated

import typer

from flows.cli.options import RecipeArgument, SetOption

app = typer.Typer(name="config", help="Print recipes and settings.", no_args_is_help=True)


@app.command("show")
def show(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Print the resolved recipe with every default and its explanation.

    Only defaults of an objective's parameters are left out, because another objective has others.
    """
    from dpo_core.yaml import commented
    from tasks.recipe.read import load_recipe

    typer.echo(commented(load_recipe(recipe, overrides or []).without_default_parameters()), nl=False)


@app.command("cluster")
def cluster(
    on: Annotated[str, typer.Argument(metavar="WHERE", help="kubernetes, slurm or skypilot.")],
) -> None:
    """Print a template of the settings for `dpo launch --on WHERE --settings FILE`, with explanations."""
    from deploy.launchers.registry import TARGETS
    from dpo_core.errors import RecipeError
    from dpo_core.yaml import form

    if on not in TARGETS:
        raise RecipeError(f"there is no cluster '{on}'", f"Choose one of: {', '.join(TARGETS)}")
    typer.echo(form(TARGETS[on][0]), nl=False)


@app.command("deployment")
def deployment(recipe: RecipeArgument) -> None:
    """Print a deployment file that runs a recipe in this folder every night, for `dpo deploy --file`."""
    from flows.commands.deployment_file import deployment_file

    typer.echo(deployment_file(recipe), nl=False)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from tasks.recipe.recipe import json_schema

    typer.echo(json_schema())


@app.command("list")
def list_recipes() -> None:
    """List the recipes that come with the package."""
    from dpo_core.yaml import read_yaml
    from tasks.recipe.read import shipped_recipes

    for name, path in shipped_recipes().items():
        about = str((read_yaml(path.read_text()) or {}).get("description", ""))
        typer.echo(f"{name:16} {path}\n{'':16} {' '.join(about.split())}")
