"""The bodies of `dpo evaluate` and `dpo compare`: evaluate models and print their results."""

from pathlib import Path
from typing import Any

import typer

from deploy.launchers import Cluster
from flows.commands.terminal import terminal
from tasks.recipe.read import with_overrides
from tasks.reports.evaluation_report import EvaluationReport, terminal_table
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
    """Evaluate one model, or compare two, and print the results.

    Args:
        request: the fields of the `EvaluationRequest` that options set.
    """
    settings = with_overrides(EvaluationRequest, request, overrides, "it cannot be evaluated", _FIELDS)
    folder = open_workspace(workspace)
    require_writable(folder)
    with stoppable():
        report, page = evaluate_models(models, settings, folder, cluster)
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        _show(report, page)


def _show(report: EvaluationReport, page: Path) -> None:
    console = terminal()
    console.print(terminal_table(report))
    console.print(f"page    {page}", soft_wrap=True)
    console.print(f"items   {page.with_name('results.json')}", soft_wrap=True)
