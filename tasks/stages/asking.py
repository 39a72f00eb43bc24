"""Ask models by jobs, whether a stage of a run or a command wants the answers."""

import datetime
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.launchers import Cluster, launcher_of
from dpo_core.data.tokens.chat_template import template_in
from dpo_core.data.tokens.config import TokenConfig, settled
from dpo_core.jobs.files import AskedModel, InferenceConfig, ModelJob, write_job
from dpo_core.models.remote_code import trusted
from tasks.signals import stop_of_process
from tasks.stages.base import Work
from tasks.stages.job import common, done, run_model_job, watch
from tasks.store.store import Store

RunJob = Callable[[str, Callable[[dict[str, Any]], ModelJob], int], dict[str, Any]]
"""Runs a job and returns its result, given a SHA-256 of all that decides the result, a function that makes
the job file from the fields that all have, and the total of the progress that the job counts."""


def asked_model(name: str, path: Path, tokens: TokenConfig) -> AskedModel:
    """A checkpoint folder as a model that is asked: what it reads is dated today where its template asks."""
    dated = settled(tokens, template_in(path), datetime.date.today())
    return AskedModel(name=name, path=str(path), tokens=dated)


def jobs_of_stage(given: Work) -> RunJob:
    """Jobs of a stage; each has a folder of its own, because its partial results are told by place alone."""

    def run(key: str, make: Callable[[dict[str, Any]], ModelJob], total: int) -> dict[str, Any]:
        fields = common(given) | {"work": str(given.scratch / key[:16])}
        Path(fields["work"]).mkdir(exist_ok=True)
        return run_model_job(given, make(fields), total=total)

    return run


@dataclass(frozen=True)
class CommandJobs:
    """Jobs of a command that is no run: on this machine, or on a cluster.

    Args:
        progress: given a title, makes a context whose function is told how many of how many units are done.
    """

    workspace: Path
    ranks: InferenceConfig
    progress: Callable[[str], Any]
    cluster: Cluster | None = None

    def named(self, name: str, title: str) -> RunJob:
        """Jobs of one kind.

        Args:
            name: the kind, as errors and the working folder have it.
            title: as the progress bar has it.
        """
        store, stop = Store(self.workspace), stop_of_process()

        def run(key: str, make: Callable[[dict[str, Any]], ModelJob], total: int) -> dict[str, Any]:
            with store.lock(name, key), self.progress(title) as told:
                # The same for a key: a command that is repeated after a kill goes on.
                work = store.begin(name, key)
                fields = {"work": str(work), "ranks": self.ranks, "trusted_code": tuple(trusted())}
                path = write_job(make(fields))
                launcher = launcher_of(self.cluster, f"{name} {work}", stop.hurry)

                def look() -> None:
                    told(min(done(work), total), total)

                result = watch(name, launcher, path, self.ranks.processes or 1, stop, look)
            shutil.rmtree(work, ignore_errors=True)
            return result

        return run
