"""Workspaces with finished runs to promote, in a real MLflow, and promotions in processes of their own."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dpo_core.evaluation.decision import Decision, Reason
from tasks.recipe.sections import TrackingConfig
from tasks.reports.run_report import ModelRow, RunReport
from tasks.runs.record import RunRecord, save_run
from tasks.store.manifest import digest_folder
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import Tracker
from tests.support.reports.run_reports import example
from tests.support.runs import forked

NAME = "dpo-tiny"
REFERENCE = "the reference"


class World:
    """A workspace, and the MLflow database that its runs wrote to."""

    def __init__(self, workspace: Path, uri: str | None = None) -> None:
        self.workspace = workspace
        # In words: MLflow puts the last address that a process used into its environment.
        self.tracker = Tracker(TrackingConfig(uri=uri or f"sqlite:///{workspace}/mlflow.db"), workspace)

    @classmethod
    def on(cls, database: Path, workspace: Path) -> "World":
        """A fresh workspace with a copy of an empty database: making its tables takes seconds."""
        workspace.mkdir(parents=True, exist_ok=True)
        shutil.copy(database, workspace / "mlflow.db")
        return cls(workspace)

    def run(
        self,
        run_id: str,
        champion: str = REFERENCE,
        *,
        promote: bool = True,
        name: str = NAME,
        **changes: Any,
    ) -> RunReport:
        """A finished run with registered weights, whose decision was made on `champion`."""
        mlflow_id = self.tracker.start_parent(run_id, recipe={"name": "tiny"})
        folder = self.workspace / "weights" / run_id
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(run_id)
        sha256 = digest_folder(folder)
        version = register_model(self.tracker, name, str(folder), tags={"dpo.artifact_sha256": sha256})
        self.tracker.finish_parent()
        rules = [Reason(rule="max_kl", passed=True, text="KL 1.2 nats: at most 10")]
        if not promote:
            rules.insert(
                0, Reason(rule="min_gain", passed=False, text="gain +0.01 [-0.02, 0.04]: not above 0")
            )
        base = example(steps=2)
        info = {"name": run_id, "mlflow_run_id": mlflow_id, "tracking_uri": self.tracker.uri}
        report = example(
            steps=2,
            run=base.run.model_copy(update=info),
            decision=Decision(
                promote=promote, candidate=f"{name} version {version}", champion=champion, reasons=rules
            ),
            model=ModelRow(
                name=name, version=version, alias="challenger", uri=folder.as_uri(), sha256=sha256
            ),
        ).model_copy(update=changes)
        self.record(run_id)
        self.report_of(run_id).write_text(report.model_dump_json())
        return report

    def record(self, run_id: str, status: str = "done") -> None:
        save_run(
            self.workspace,
            RunRecord(run_id=run_id, recipe="tiny", status=status, started_at=datetime.now(UTC)),
        )

    def report_of(self, run_id: str) -> Path:
        return self.workspace / "runs" / run_id / "report.json"

    @property
    def client(self) -> Any:
        return self.tracker.ask("the client", lambda client: client)

    def aliases(self, name: str = NAME) -> dict[str, str]:
        """Who holds which alias."""
        return {alias: str(v) for alias, v in self.client.get_registered_model(name).aliases.items()}

    def tags(self, version: str, name: str = NAME) -> dict[str, str]:
        return dict(self.client.get_model_version(name, version).tags)


class Ended(NamedTuple):
    """A command that ran in a process of its own."""

    code: int
    """Negative: the signal that ended it."""
    said: str


_WRITES = (
    "create_registered_model", "create_model_version", "delete_model_version", "set_model_version_tag",
    "set_registered_model_alias", "delete_registered_model_alias",
)  # fmt: skip


def dpo_at_once(commands: Sequence[Sequence[str]], folder: Path, *, decided: bool = False) -> list[Ended]:
    """The commands side by side, each let go when all are ready.

    Args:
        decided: ready means that each has found nothing against its promotion and is about to write it.
    """
    return _all(commands, folder, _Together(forked.PROCESSES.Barrier(len(commands)), decided))


def dpo_killed(*arguments: str, folder: Path, before_write: int) -> Ended:
    """One command that SIGKILL ends just before it writes to MLflow for the n-th time, counted from 0."""
    return _all([arguments], folder, _Killed(before_write))[0]


class _Together(NamedTuple):
    barrier: Any
    decided: bool

    def __call__(self) -> None:
        from tasks.promotion.ledger import Ledger

        if not self.decided:
            self.barrier.wait(60)
            return
        append = Ledger.append

        def wait_first(ledger: Any, change: Any) -> bool:
            self.barrier.wait(60)
            return append(ledger, change)

        Ledger.append = wait_first  # type: ignore[method-assign]


class _Killed(NamedTuple):
    before: int

    def __call__(self) -> None:
        from mlflow import MlflowClient

        count = 0

        def counted(write: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **more: Any) -> Any:
                nonlocal count
                if count == self.before:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return write(*given, **more)

            return call

        for name in _WRITES:
            setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))


def _all(commands: Sequence[Sequence[str]], folder: Path, prepare: Any) -> list[Ended]:
    logs = [folder / f"said-{number}.txt" for number in range(len(commands))]
    started = [
        forked.PROCESSES.Process(target=_main, args=(list(command), log, prepare, dict(os.environ)))
        for command, log in zip(commands, logs, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
        process.join()
    return [
        Ended(int(process.exitcode or 0), log.read_text()) for process, log in zip(started, logs, strict=True)
    ]


def _main(arguments: list[str], log: Path, prepare: Any, env: dict[str, str]) -> None:
    from flows.cli.main import main

    forked.set_environment(env)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with log.open("w", buffering=1) as out, redirect_stdout(out), redirect_stderr(out):
        if prepare is not None:
            prepare()
        sys.argv = ["dpo", *arguments]
        main()
