"""The entry point of the command line `dpo`.

Exit codes are those of `dpo_core.errors`; 130 stopped by Ctrl-C (SIGINT), 143 by SIGTERM, 129 by SIGHUP. An
expected error is one line on stderr; its traceback goes to a log.
"""

import atexit
import gc as garbage_collector
import logging
import os
import stat
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import typer

from dpo_core.errors import DpoError
from dpo_core.redaction import WithoutSecrets, redact
from dpo_core.system import INSTALL_JOB_PACKAGES, JOB_PACKAGES
from flows.cli import config
from flows.cli.catalog import methods, objectives
from flows.cli.deploy import deploy, event_app, schedule_app
from flows.cli.doctor import doctor
from flows.cli.evaluate import compare, evaluate
from flows.cli.gc import gc
from flows.cli.init import init
from flows.cli.launch import launch
from flows.cli.plan import plan
from flows.cli.promote import promote, rollback
from flows.cli.run import run, show
from flows.cli.runs import runs
from flows.cli.ui import ui
from flows.cli.validate import validate
from flows.process.environment import keep_quiet

app = typer.Typer(
    name="dpo",
    help="Align a language model from preference data, and see every stage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_PANELS: dict[str, list[Any]] = {
    "Run": [init, run, plan, validate, launch, config.app, objectives, methods],
    "Look": [runs, show, ui],
    "Evaluate and decide": [evaluate, compare, promote, rollback],
    "Schedule and deploy": [deploy, schedule_app, event_app],
    "Look after a workspace": [doctor, gc],
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, rich_help_panel=_panel)
        else:
            _paragraphs = (_command.__doc__ or "").split("\n\n")
            _help = "\n\n".join(" ".join(text.split()) for text in _paragraphs)  # Typer would keep the lines
            app.command(rich_help_panel=_panel, help=_help)(_command)


def _log_to_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    handler.addFilter(WithoutSecrets())
    # Messages of the run itself, and warnings of the packages (a damaged artifact, MLflow unreachable).
    for name, level in {"dpo": logging.INFO, "tasks": logging.WARNING, "dpo_core": logging.WARNING}.items():
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _with_resume_value(arguments: list[str]) -> list[str]:
    """Add `latest`, the newest unfinished run, to a `--resume` without a value."""
    completed = []
    for index, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--resume" and (not following or following[0].startswith("-")):
            completed.append("latest")
    return completed


def main() -> None:
    """Entry point of the command `dpo`."""
    # Imports create tens of thousands of permanent objects; scanning them again and again takes 0.1 s.
    garbage_collector.set_threshold(50_000)
    atexit.register(
        garbage_collector.freeze
    )  # else Python scans a million of them once more when it exits: two seconds
    keep_quiet()  # before Prefect, MLflow and Great Expectations are imported
    _log_to_terminal()
    try:
        app(_with_resume_value(sys.argv[1:]))
    except DpoError as error:
        _save_traceback()
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
        path = _save_traceback()
        where = f"The traceback is in {path}" if path else "The traceback could not be saved"
        typer.echo(f"error: {type(error).__name__}: {_one_line(error)}. {where}", err=True)
        sys.exit(4)


def _one_line(error: Exception) -> str:
    """The message without line breaks and secrets, shortened: libraries include long values in theirs."""
    text = redact(" ".join(str(error).split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


_LONGEST = 2000


def _save_traceback() -> Path | None:
    """Append the current traceback to a log that users can send with a report; None if that fails.

    All users can write to the temporary folder and know the log's name, so a link or another user's file of
    that name is not written to.
    """
    path = Path(tempfile.gettempdir()) / f"dpo-{os.getuid()}.log"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
        with open(file, "a", encoding="utf-8") as handle:
            facts = os.fstat(file)
            if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
                raise PermissionError(f"{path} is not a file of this user alone")
            os.fchmod(file, 0o600)
            handle.write(redact(traceback.format_exc()) + "\n")
    except OSError:  # a full disk must not hide the error
        return None
    return path


if __name__ == "__main__":
    main()
