"""`dpo plan`: print what a run would do, and what it would cost."""

import typer

from flows.cli.options import JsonOption, RecipeArgument, SetOption


def plan(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Print what `dpo run` would do: stages, cache, tokens, operations, memory and time. Starts nothing."""
    from tasks.recipe.policies import is_external
    from tasks.recipe.read import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    typer.echo(f"recipe {resolved.name}: reading the model and the data takes about a minute", err=True)
    from dpo_core.models.source import require_local

    if not is_external(resolved.model.name):
        require_local(resolved.model.name)
    from flows.commands.plan import check_reward, plan_recipe, show

    check_reward(resolved)
    result = plan_recipe(resolved)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        show(result)
