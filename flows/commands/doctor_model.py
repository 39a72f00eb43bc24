"""The body of `dpo doctor --model`: checks whether a model can be aligned."""

import json
from pathlib import Path

import typer

from dpo_core.config import Config
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.model_check import REMEDY, check_named
from dpo_core.models.config import ModelConfig
from dpo_core.scoring.precision import Precision
from tasks.promotion.model_source import as_folder
from tasks.recipe.read import with_overrides


class _Settings(Config):
    """The recipe sections that the check reads."""

    model: ModelConfig
    tokens: TokenConfig = TokenConfig()
    precision: Precision = "bf16"


def check_model(name: str, overrides: list[str], workspace: Path, as_json: bool) -> str:
    """Print whether the model is packed, padded or refused, and why; returns that word."""
    sections = {"model": {"name": name}, "tokens": {}}
    settings = with_overrides(
        _Settings, sections, overrides, f"{name} cannot be checked", "Correct the override"
    )
    longest = settings.tokens.max_length if "max_length" in settings.tokens.model_fields_set else None
    model, _ = as_folder(settings.model, workspace)
    check = check_named(model, precision=settings.precision, longest=longest)
    if as_json:
        typer.echo(json.dumps({"layout": check.layout, "reason": check.reason, "sampling": check.sampling}))
    else:
        typer.echo(f"{check.layout}: {check.reason}")
        if check.layout == "refused":
            typer.echo(REMEDY)
    return check.layout
