"""`dpo doctor`: check for common faults, and say what to do about each."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import WORKSPACE, JsonOption, SetOption, WorkspaceOption


def doctor(
    workspace: WorkspaceOption = WORKSPACE,
    model: Annotated[
        str | None, typer.Option(help="Check only whether this model can be aligned; as model.name.")
    ] = None,
    overrides: SetOption = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A deployment file to compare with the server; by default each that was deployed to it."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check packages, workspace, MLflow, Prefect, ports and promotions for common faults. Changes nothing.

    Exit code 4: something is broken.
    """
    from dpo_core.errors import RecipeError
    from tasks.store.files import open_workspace

    folder = open_workspace(workspace)
    if model is not None:
        from flows.commands.doctor_model import check_model

        if check_model(model, overrides or [], folder, as_json) == "refused":
            raise typer.Exit(4)
        return
    if overrides:
        raise RecipeError("--set has no effect without --model", "Add --model, or remove --set")
    from flows.commands.doctor import diagnose

    diagnose(folder, file, as_json)
