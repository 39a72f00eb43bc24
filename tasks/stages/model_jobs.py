"""`RunJob`, a function that runs one model job: for a stage of a run, or for a command outside a run."""

import datetime
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.launchers import Cluster, launcher_of
from deploy.launchers.job_server_client import JobServer
from dpo_core.data.tokens.chat_template import template_in
from dpo_core.data.tokens.config import TokenConfig, with_date
from dpo_core.jobs.files import InferenceConfig, ModelJob, NamedModel, write_job
from dpo_core.models.remote_code import trusted_digests
from tasks.signals import stop_of_process
from tasks.stages.base import RunningStage
from tasks.stages.job import common_fields, finished_units, run_model_job, watch
from tasks.store.store import Store

RunJob = Callable[[str, Callable[[dict[str, Any]], ModelJob], int], dict[str, Any]]
"""Runs a job and returns its result. Arguments: a SHA-256 of everything that decides the result, a function
that makes the job file from the common fields, and the total of the units that the job counts."""


def asked_model(name: str, path: Path, tokens: TokenConfig) -> NamedModel:
    """A checkpoint folder as a model to ask; a chat template that uses the date gets today's."""
    dated = with_date(tokens, template_in(path), datetime.date.today())
    return NamedModel(name=name, path=str(path), tokens=dated)


def jobs_of_stage(running: RunningStage) -> RunJob:
    """Runs jobs of a stage, each in its own folder, because the folder alone identifies partial results."""

    def run(key: str, make: Callable[[dict[str, Any]], ModelJob], total: int) -> dict[str, Any]:
        fields = common_fields(running) | {"work": str(running.scratch / key[:16])}
        Path(fields["work"]).mkdir(exist_ok=True)
        return run_model_job(running, make(fields), total=total, unit="items")

    return run


@dataclass(frozen=True)
class CommandJobs:
    """Runs jobs of a command outside a run, on this machine or on a cluster.

    Args:
        progress: makes a progress bar from its title: a context of a function of the done and total units.
    """

    workspace: Path
    ranks: InferenceConfig
    progress: Callable[[str], Any]
    cluster: Cluster | None = None
    server: JobServer = field(default_factory=JobServer)
    """Starts jobs of one process on this machine."""

    def named(self, name: str, title: str) -> RunJob:
        """Runs jobs of one kind.

        Args:
            name: the kind, in errors and in the name of the work folder.
            title: of the progress bar.
        """
        store, stop = Store(self.workspace), stop_of_process()

        def run(key: str, make: Callable[[dict[str, Any]], ModelJob], total: int) -> dict[str, Any]:
            with store.lock(name, key), self.progress(title) as show:
                # The folder depends on the key alone: a command repeated after a kill continues the job.
                work = store.begin(name, key)
                fields = {"work": str(work), "ranks": self.ranks, "trusted_code": tuple(trusted_digests())}
                job = make(fields)
                path = write_job(job)
                cluster = self.cluster.for_one_rank() if self.cluster and job.one_rank else self.cluster
                launcher = launcher_of(cluster, f"{name} {work}", stop.no_time_to_save, self.server)

                def on_poll() -> None:
                    show(min(finished_units(work), total), total)

                result = watch(name, launcher, path, job.processes, stop, on_poll)
            shutil.rmtree(work, ignore_errors=True)
            return result

        return run
