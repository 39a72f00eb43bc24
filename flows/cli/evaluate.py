"""`dpo evaluate` and `dpo compare`: suites and win rates of any models, without a run."""

from typing import Annotated, Any

import typer

from flows.cli.options import (
    WORKSPACE,
    JsonOption,
    OnOption,
    SettingsOption,
    WithOption,
    WorkspaceOption,
)

SuiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suite", help="A suite, or several separated by commas; may be repeated. `dpo evaluate` lists them."
    ),
]
DataOption = Annotated[str, typer.Option(help="The folder with the suites' files.")]
ReferenceOption = Annotated[
    str | None, typer.Option(help="The reference of the model, for implicit rewards.")
]
TrainOption = Annotated[
    str | None, typer.Option(help="Its training data: results without the items that occur there are added.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        help="Set a field of settings.*, tokens.*, judge.*, answers.* or ranks.*.",
    ),
]
ModelHelp = (
    "A checkpoint folder, .gguf file, package:NAME, hub name, models:/NAME@ALIAS, models:/NAME/VERSION, "
    "or RUN or RUN:POLICY of the workspace. POLICY: SFT or a policy of the run's recipe; by default the "
    "run's candidate."
)


def evaluate(  # noqa: PLR0913 - options of a command
    model: Annotated[str | None, typer.Argument(help=ModelHelp)] = None,
    suite: SuiteOption = None,
    data: DataOption = ".",
    reference: ReferenceOption = None,
    train: TrainOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run code that the model writes, in a sandbox.")
    ] = False,
    overrides: SetOption = None,
    on: OnOption = "local",
    cluster: SettingsOption = None,
    over_cluster: WithOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model on suites, without a run. Without a model: list the suites."""
    if model is None:
        from dpo_core.evaluation.suites.registry import suites

        for name, entry in suites().items():
            typer.echo(f"{name:16} {entry.title}: {entry.about} (reads {entry.files[0]})")
        return
    from flows.commands import evaluate as body
    from flows.commands.cluster import read_cluster

    request = _request(suite, data, reference, train, run_code)
    place = read_cluster(on, cluster, over_cluster or [])
    body.evaluate([model], request, overrides or [], workspace, place, as_json)


def compare(  # noqa: PLR0913 - options of a command
    a: Annotated[str, typer.Argument(help=ModelHelp)],
    b: Annotated[str, typer.Argument(help="The model to compare A with, in the same forms.")],
    suite: SuiteOption = None,
    data: DataOption = ".",
    reference: ReferenceOption = None,
    train: TrainOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A data file of prompts for a win rate. Models continue text prompts as they are; "
            "for a chat, write messages."
        ),
    ] = None,
    workspace: WorkspaceOption = WORKSPACE,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run code that the models write, in a sandbox.")
    ] = False,
    overrides: SetOption = None,
    on: OnOption = "local",
    cluster: SettingsOption = None,
    over_cluster: WithOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two models item by item on suites, by a judge on prompts, and runs by their settings."""
    from flows.commands import evaluate as body
    from flows.commands.cluster import read_cluster

    request = _request(suite, data, reference, train, run_code)
    request |= {"prompts": {"path": prompts} if prompts else None}
    place = read_cluster(on, cluster, over_cluster or [])
    body.evaluate([a, b], request, overrides or [], workspace, place, as_json)


def _request(
    suite: list[str] | None, data: str, reference: str | None, train: str | None, run_code: bool
) -> dict[str, Any]:
    """The fields of the `EvaluationRequest` that these options set."""
    return {
        "suites": [name.strip() for part in suite or [] for name in part.split(",") if name.strip()],
        "data": data,
        "reference": reference,
        "train": {"path": train} if train else None,
        "settings": {"run_code": True} if run_code else {},
    }
