"""`dpo objectives` and `dpo methods`: list what a policy can be trained with."""

from typing import Annotated

import typer

from flows.cli.options import JsonOption


def objectives(
    names: Annotated[
        list[str] | None, typer.Argument(help="Show only these, each with its complete definition.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the objectives and their variants: definition, needs, citation, parameters and ranges."""
    from flows.commands.objectives import list_objectives

    list_objectives(names or [], as_json)


def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Show only these, with their settings.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods of policies: what they learn from, what they need, their citation and settings."""
    from flows.commands.methods import list_methods

    list_methods(names or [], as_json)
