"""`dpo evaluate` and `dpo compare`: suites and win rates of any checkpoints, without a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.launch import OnOption, SettingsOption, WithOption, read_cluster
from flows.cli.options import JsonOption

SuiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suite", help="A suite, or several with commas between; may be repeated. `dpo evaluate` lists them."
    ),
]
DataOption = Annotated[str, typer.Option(help="The folder with the suites' files.")]
ReferenceOption = Annotated[
    str | None, typer.Option(help="What the model was trained from, for implicit rewards.")
]
TrainOption = Annotated[
    str | None, typer.Option(help="What it was trained on: items found there are named and left out too.")
]
WorkspaceOption = Annotated[str, typer.Option(help="Workspace folder; results are kept there.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=VALUE", help="A field of settings.*, tokens.*, judge.*, answers.*, ranks.*."
    ),
]
ModelHelp = (
    "A checkpoint folder, .gguf file, package:NAME, hub name, models:/NAME@ALIAS, models:/NAME/VERSION, "
    "or RUN or RUN:POLICY of the workspace. Policies: SFT, DPO, PPO, GRPO, Dr. GRPO, DAPO, GSPO, RLOO, "
    "Online DPO, as the run has them; the registered one where none is named."
)


def evaluate(
    model: Annotated[str | None, typer.Argument(help=ModelHelp)] = None,
    suite: SuiteOption = None,
    data: DataOption = ".",
    reference: ReferenceOption = None,
    train: TrainOption = None,
    workspace: WorkspaceOption = "./runs",
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let code that the model wrote be run, in a sandbox.")
    ] = False,
    overrides: SetOption = None,
    on: OnOption = "local",
    cluster: SettingsOption = None,
    over_cluster: WithOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put one model through evaluation suites, without a pipeline run. Without a model: list the suites."""
    if model is None:
        _list_suites()
        return
    settings = {"run_code": True} if run_code else {}
    given = {"suites": _names(suite or []), "data": data, "reference": reference, "train": _train(train)}
    place = read_cluster(on, cluster, over_cluster or [])
    _run([model], given | {"settings": settings}, workspace, overrides or [], place, as_json)


def compare(
    a: Annotated[str, typer.Argument(help=ModelHelp)],
    b: Annotated[str, typer.Argument(help="What A is held against, named in the same way.")],
    suite: SuiteOption = None,
    data: DataOption = ".",
    reference: ReferenceOption = None,
    train: TrainOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A data file whose prompts both answer, for a win rate. Text is continued as it stands; "
            "write messages for a chat."
        ),
    ] = None,
    workspace: WorkspaceOption = "./runs",
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let code that the models wrote be run, in a sandbox.")
    ] = False,
    overrides: SetOption = None,
    on: OnOption = "local",
    cluster: SettingsOption = None,
    over_cluster: WithOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two models item by item on suites, and by a judge on prompts."""
    settings = {"run_code": True} if run_code else {}
    given = {"suites": _names(suite or []), "data": data, "reference": reference, "train": _train(train)}
    given |= {"settings": settings, "prompts": {"path": prompts} if prompts else None}
    place = read_cluster(on, cluster, over_cluster or [])
    _run([a, b], given, workspace, overrides or [], place, as_json)


_FIELDS = (
    "Fields are settings.limit, .precision, .chat, .samples, .sampling, .classifier and others of "
    "suites.settings in `dpo config schema`; tokens.max_length; ranks.processes; for --prompts most_prompts, "
    "answers.max_new_tokens, judge.source, judge.kind, judge.endpoint.base_url, judge.endpoint.model"
)


def _names(given: list[str]) -> list[str]:
    return [name.strip() for part in given for name in part.split(",") if name.strip()]


def _train(path: str | None) -> dict[str, Any] | None:
    return {"path": path} if path else None


def _list_suites() -> None:
    from dpo_core.evaluation.suites.registry import suites

    for name, suite in suites().items():
        typer.echo(f"{name:16} {suite.title}: {suite.about} (reads {suite.files[0]})")


def _run(
    models: list[str],
    given: dict[str, Any],
    workspace: str,
    overrides: list[str],
    cluster: Any,
    as_json: bool,
) -> None:
    from tasks.recipe.read import with_overrides
    from tasks.signals import stoppable
    from tasks.stages.standalone_evaluation import EvaluationRequest, evaluate_models
    from tasks.store.files import open_workspace, require_writable

    request = with_overrides(EvaluationRequest, given, overrides, "it cannot be evaluated", _FIELDS)
    folder = open_workspace(workspace)
    require_writable(folder)
    with stoppable():
        report, page = evaluate_models(models, request, folder, cluster)
    if as_json:
        typer.echo(report.model_dump_json())
        return
    _show(report, page)


def _show(report: Any, page: Path) -> None:
    from flows.cli.terminal import terminal
    from tasks.reports.evaluation_report import terminal_table

    console = terminal()
    console.print(terminal_table(report))
    console.print(f"page    {page}", soft_wrap=True)
    console.print(f"items   {page.with_name('results.json')}", soft_wrap=True)
