"""The bodies of `dpo evaluate` and `dpo compare`: evaluate models and print their results."""

from pathlib import Path
from typing import Any

import typer

from deploy.launchers import Cluster
from dpo_core.errors import RecipeError
from flows.commands.terminal import terminal
from tasks.recipe.read import with_overrides
from tasks.reports.evaluation_report import EvaluationReport, evaluation_document
from tasks.reports.terminal import terminal as as_table
from tasks.runs.recipe import differing_settings
from tasks.signals import stoppable
from tasks.stages.standalone_evaluation import EvaluationRequest, evaluate_models
from tasks.store.files import open_workspace, require_writable

_FIELDS = (
    "Fields are settings.limit, .precision, .chat, .samples, .sampling, .classifier and others of "
    "suites.settings in `dpo config schema`; tokens.max_length; ranks.processes; for --prompts most_prompts, "
    "answers.max_new_tokens, judge.source, judge.kind, judge.endpoint.base_url, judge.endpoint.model"
)


def evaluate(
    models: list[str],
    request: dict[str, Any],
    overrides: list[str],
    workspace: str,
    cluster: Cluster | None,
    as_json: bool,
) -> None:
    """Evaluate one model, or compare two, and print the results; of two runs, the settings that differ first.

    Args:
        request: the fields of the `EvaluationRequest` that options set.
    """
    settings = with_overrides(EvaluationRequest, request, overrides, "it cannot be evaluated", _FIELDS)
    folder = open_workspace(workspace)
    if len(models) == 2 and not as_json:
        of_runs = _show_differing_settings(models, folder)
        if of_runs and not settings.suites and settings.prompts is None:
            typer.echo("to compare what the models do, add --suite or --prompts")
            return
    require_writable(folder)
    with stoppable():
        report, page = evaluate_models(models, settings, folder, cluster)
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        _show(report, page)


def _show_differing_settings(models: list[str], workspace: Path) -> bool:
    """Print the settings in which the runs of two models differ; False if they cannot be compared."""
    try:
        differing = differing_settings(workspace, *models)
    except RecipeError as error:  # the models can still be compared
        typer.echo(f"the settings of the runs are not compared: {error.problem}")
        return False
    if differing is None:
        return False
    for line in differing or ["none differs"]:
        typer.echo(f"setting {line}")
    return True


def _show(report: EvaluationReport, page: Path) -> None:
    console = terminal()
    console.print(as_table(evaluation_document(report)))
    console.print(f"page    {page}", soft_wrap=True)
    console.print(f"items   {page.with_name('results.json')}", soft_wrap=True)
