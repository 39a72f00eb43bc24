"""The command line `dpo`.

Exit codes: 0 done, 2 usage or recipe error, 3 the data gate refused, 4 a stage failed (resumable), 5
promotion refused; 130 stopped by Ctrl-C (SIGINT), 143 by SIGTERM, 129 by SIGHUP. An expected error is one
line on stderr; its traceback goes to a log.
"""

import gc
import json
import logging
import os
import stat
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from dpo_core.redaction import WithoutSecrets, hidden
from dpo_core.system import INSTALL_JOB_PACKAGES, JOB_PACKAGES
from flows.cli.cache import app as cache_app
from flows.cli.deploy import deploy as deploy_command
from flows.cli.doctor import doctor as doctor_command
from flows.cli.evaluate import compare as compare_command
from flows.cli.evaluate import evaluate as evaluate_command
from flows.cli.event import app as event_app
from flows.cli.gc import gc as gc_command
from flows.cli.launch import launch as launch_command
from flows.cli.options import JsonOption, RecipeArgument, SetOption
from flows.cli.plan import plan as plan_command
from flows.cli.promote import promote as promote_command
from flows.cli.promote import rollback as rollback_command
from flows.cli.run import run as run_command
from flows.cli.run import show as show_command
from flows.cli.schedule import app as schedule_app
from flows.process.environment import keep_quiet

app = typer.Typer(
    name="dpo",
    help="Align a language model from preference data, and see every stage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")
app.command("run")(run_command)
app.command("show")(show_command)
app.command("doctor")(doctor_command)
app.command("gc")(gc_command)
app.command("plan")(plan_command)
app.command("launch")(launch_command)
app.command("evaluate")(evaluate_command)
app.command("compare")(compare_command)
app.command("promote")(promote_command)
app.command("rollback")(rollback_command)
app.command("deploy")(deploy_command)
app.add_typer(schedule_app, name="schedule")
app.add_typer(event_app, name="event")


@app.command()
def validate(
    data: Annotated[str, typer.Argument(help="A data file, a folder, or a hub name.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Judge with this model's tokenizer and template (as model.name)."),
    ] = None,
    show: Annotated[
        int, typer.Option(metavar="N", min=0, help="Print the first rows as the model will see them.")
    ] = 0,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recognise the format of a data set and judge it at the gate; trains nothing."""
    from flows.cli.validate import judge_file

    report, recognised, rows = judge_file(data, overrides or [], model, show)
    if as_json:
        typer.echo(json.dumps(report.model_dump(mode="json") | rows.data, indent=1, ensure_ascii=False))
    else:
        typer.echo(f"{data}: {recognised}")
        for finding in report.findings:
            if not finding.passed:
                typer.echo(f"{finding.severity:8} {finding.rule}: {finding.message}")
            elif finding.skipped:
                typer.echo(f"{'skipped':8} {finding.rule}: {finding.message}")
        typer.echo(f"{report.rows} rows, {report.dropped} dropped; Data Docs: {report.docs_index}")
        for text in rows.texts:
            typer.echo(f"\n{text}")
    report.raise_if_refused()


@app.command()
def runs(
    newest: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="List so many; 20 if nothing is said, in JSON all.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List all of them.")] = False,
    status: Annotated[
        list[str] | None,
        typer.Option(help="Only running, done, failed, refused or stopped ones; may be repeated."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of a recipe.")] = None,
    workspace: Annotated[str, typer.Option(help="Workspace folder.")] = "./runs",
    as_json: JsonOption = False,
) -> None:
    """List the runs of a workspace, newest first."""
    from flows.cli.runs import list_them

    if every and newest is not None:
        raise typer.BadParameter("--all lists every run and --newest only some: give one of them")
    most = newest if newest is not None or every or as_json else 20
    list_them(workspace, most, status or [], recipe, as_json)


@app.command()
def ui(
    workspace: Annotated[str, typer.Option(help="Workspace folder.")] = "./runs",
    port: Annotated[int, typer.Option(help="Port of the MLflow UI.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open the MLflow UI on the workspace, and say how to reach Prefect's."""
    from flows.cli.ui import serve

    serve(workspace, host, port, browser)


@app.command()
def bench(overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Measure training speed and memory beside TRL's: same model, pairs, tokens and optimiser, in turns.

    Fields: workload (hh, long-prompt, long-answer, 4k), data and model (for hh), size (tiny, 135m, 360m,
    1.7b), pairs, batch_size, rounds, threads, seed; ours.precision, ours.pack_tokens, ours.compile;
    trl.precision, trl.micro_batch_size, or trl=null for ours alone.
    """
    from flows.cli.bench import run_bench

    run_bench(overrides or [], as_json)


@app.command()
def objectives(
    names: Annotated[
        list[str] | None, typer.Argument(help="Show these alone, each with its whole definition.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the objectives and what is made of them: definition, needs, citation, parameters and ranges."""
    from flows.cli.objectives import list_objectives

    list_objectives(names or [], as_json)


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Show these alone, with their settings.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods that a policy may name: what they learn from, need and cite, and their settings."""
    from flows.cli.methods import list_methods

    list_methods(names or [], as_json)


@config_app.command("show")
def config_show(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Print the resolved recipe, every default written out and explained.

    But for parameters of an objective that are its defaults: another objective has others.
    """
    from dpo_core.yaml import commented
    from tasks.recipe.read import load_recipe

    typer.echo(commented(load_recipe(recipe, overrides or []).without_default_parameters()), nl=False)


@config_app.command("cluster")
def config_cluster(
    on: Annotated[str, typer.Argument(metavar="WHERE", help="kubernetes, slurm or skypilot.")],
) -> None:
    """Print the settings of `dpo launch --on WHERE`, explained, to be filled in and given as --settings."""
    from deploy.launchers.registry import TARGETS
    from dpo_core.errors import RecipeError
    from dpo_core.yaml import form

    if on not in TARGETS:
        raise RecipeError(f"{on} has no settings of a cluster", f"Choose one of: {', '.join(TARGETS)}")
    typer.echo(form(TARGETS[on][0]), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from tasks.recipe.recipe import json_schema

    typer.echo(json_schema())


@config_app.command("list")
def config_list() -> None:
    """List the recipes that come with the package."""
    from dpo_core.yaml import read_yaml
    from tasks.recipe.read import shipped_recipes

    for name, path in shipped_recipes().items():
        about = str((read_yaml(path.read_text()) or {}).get("description", ""))
        typer.echo(f"{name:16} {path}\n{'':16} {' '.join(about.split())}")


def _log_to_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    handler.addFilter(WithoutSecrets())
    # What the run says of itself, and what its rooms warn of (a damaged artifact, MLflow away).
    for name, level in {"dpo": logging.INFO, "tasks": logging.WARNING, "dpo_core": logging.WARNING}.items():
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _with_resume_value(arguments: list[str]) -> list[str]:
    """`--resume` may stand alone: it then means the newest unfinished run."""
    out = []
    for place, argument in enumerate(arguments):
        out.append(argument)
        following = arguments[place + 1 : place + 2]
        if argument == "--resume" and (not following or following[0].startswith("-")):
            out.append("latest")
    return out


def main() -> None:
    """Entry point of the command `dpo`."""
    # Imports make tens of thousands of objects that stay; to look through them again and again takes 0.1 s.
    gc.set_threshold(50_000)
    keep_quiet()  # before Prefect, MLflow and Great Expectations are imported
    _log_to_terminal()
    from dpo_core.errors import DpoError

    try:
        app(_with_resume_value(sys.argv[1:]))
    except DpoError as error:
        _keep_traceback()
        remedy, _, block = error.remedy.partition("\n\n")  # such as YAML to put into a recipe
        typer.echo(f"error: {_one_line(type(error)(error.problem, remedy))}", err=True)
        if block:
            typer.echo(f"\n{block}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in JOB_PACKAGES:
            typer.echo(f"error: {error.name} is not installed. Run: {INSTALL_JOB_PACKAGES}", err=True)
            sys.exit(2)
        path = _keep_traceback()
        kept = f"The traceback is in {path}" if path else "Its traceback could not be kept"
        typer.echo(f"error: {type(error).__name__}: {_one_line(error)}. {kept}", err=True)
        sys.exit(4)


def _one_line(error: Exception) -> str:
    """Messages of libraries have line breaks, and lists of whatever they were given."""
    text = hidden(" ".join(str(error).split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


_LONGEST = 2000


def _keep_traceback() -> Path | None:
    """Append the traceback of the error at hand to a log that people can send along.

    Everybody may write to the temporary folder, and knows the name: a link, or a file of another user, that
    waits there is not written to.
    """
    import tempfile

    path = Path(tempfile.gettempdir()) / f"dpo-{os.getuid()}.log"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
        with open(file, "a", encoding="utf-8") as handle:
            facts = os.fstat(file)
            if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
                raise PermissionError(f"{path} is not a file of this user alone")
            os.fchmod(file, 0o600)
            handle.write(hidden(traceback.format_exc()) + "\n")
    except OSError:  # a full disk must not hide the error
        return None
    return path


if __name__ == "__main__":
    main()
