"""`dpo launch`: run a recipe whose jobs run on a cluster."""

from typing import Annotated

import typer

from flows.cli.options import (
    OnOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    SettingsOption,
    WithOption,
)
from flows.cli.run import run_recipe


def launch(
    recipe: RecipeArgument,
    on: OnOption,
    settings: SettingsOption = None,
    over_settings: WithOption = None,
    overrides: SetOption = None,
    render: Annotated[bool, typer.Option("--render", help="Print what would be submitted, and end.")] = False,
    resume: ResumeOption = None,
) -> None:
    """Run a recipe; the flow runs here, and everything that computes with a model runs on a cluster.

    The workspace must be on storage that this machine and the cluster's nodes see at the same path.
    """
    from flows.commands.cluster import read_cluster

    cluster = read_cluster(on, settings, over_settings or [])
    if render:
        from flows.commands.render import rendered

        typer.echo(rendered(recipe, overrides or [], cluster), nl=False)
        return
    run_recipe(recipe, overrides or [], resume, cluster)
