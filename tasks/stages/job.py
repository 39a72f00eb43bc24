"""Run one job of a stage: write its file, give it to the launcher, wait for its end, report its error."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.launchers import Launcher, State
from deploy.launchers.base import LOG
from dpo_core.errors import DpoError, StageFailed
from dpo_core.jobs.files import ERROR, ModelJob, write_job
from dpo_core.methods.job import Job
from dpo_core.models.remote_code import trusted
from dpo_core.ranks import PROGRESS
from tasks.signals import Stop
from tasks.stages.base import Work
from tasks.store.files import disk_fault

log = logging.getLogger("dpo")

_LESS_MEMORY = (
    "Give it more memory, or lower its micro_batch_size (pack_tokens where it packs) or engine.processes, or "
    "set engine.gradient_checkpointing=true (dpo plan tells what it needs), and start the run again without "
    "--resume: finished stages are not run again"
)


def common(given: Work) -> dict[str, Any]:
    """The fields that every job file but a training's has."""
    return {"work": str(given.scratch), "ranks": given.context.ranks, "trusted_code": tuple(trusted())}


def run_model_job(
    given: Work, job: ModelJob, *, total: int = 1, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run a job that samples, scores or evaluates, with a progress bar; returns what its rank 0 reports.

    Args:
        total: the sum of the sizes that the job's progress counts.
        tick: called at each look at the job.
    """
    work = Path(job.work)
    bar = given.progress(total)

    def look() -> None:
        bar.update(min(done(work), total))
        tick()

    return run_job(given, job, job.processes, look)


def run_job(given: Work, job: ModelJob | Job, processes: int, look: Callable[[], None]) -> dict[str, Any]:
    """Run one job of a stage to its end; returns what its rank 0 reports.

    Args:
        processes: ranks on each node.
        look: called every now and then while the job runs.

    Raises:
        DpoError: the error that the job left, or what is known of a job that left none.
    """
    path = write_job(job)
    work = Path(job.work)
    # The folder is this job's own: its stage, settings and data.
    launcher = given.context.launcher(f"{given.name} {work}", one_rank=getattr(job, "one_rank", False))
    given.mlflow.tag("dpo.command", launcher.render(path, processes))
    try:
        return watch(given.name, launcher, path, processes, given.context.stop, look)
    finally:
        with suppress(FileNotFoundError):
            given.mlflow.artifact(work / LOG, "logs")


def watch(
    name: str,
    launcher: Launcher,
    path: Path,
    processes: int,
    stop: Stop,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Submit a job and wait for it. Whatever ends the wait ends the job too."""
    work = path.parent
    handle = launcher.submit(path, processes, work)
    try:
        while True:
            stop.check()
            state = launcher.poll(handle)
            look()
            if state is not State.RUNNING:
                break
            time.sleep(launcher.pause)
        why = launcher.why(handle) if state is State.FAILED else ""
    except BaseException as error:
        stop.begin(error)
        raise
    finally:
        launcher.cancel(handle)
    if state is not State.DONE:
        raise _error_of(name, work, launcher.logs(handle), state, why)
    result: dict[str, Any] = json.loads((work / "result.json").read_text())
    return result


def done(work: Path) -> int:
    """What the ranks of a job have done, in the sizes of their units."""
    return sum(int(path.read_text()) for path in work.glob(PROGRESS.format(rank="*")))


def _error_of(name: str, work: Path, tail: str, state: State, why: str) -> DpoError:
    """The error that the job left, as the class its exit code stands for."""
    if state is State.STOPPED:
        return StageFailed(f"{name} was stopped and saved its state", "Resume the run")
    if _short_of_memory(why):  # the other ranks have only missed the one that was killed
        return StageFailed(f"{name} failed: {why}", _LESS_MEMORY)
    try:
        left = json.loads((work / ERROR).read_text())
    except (OSError, ValueError):
        return _without_message(name, work, tail, why)
    if fault := disk_fault(left["problem"], work, f"stage {name}"):
        return fault
    remedy = _LESS_MEMORY if _short_of_memory(left["problem"]) else left["remedy"]
    error = StageFailed(f"{name}: {left['problem']}", remedy)
    error.exit_code = int(left["exit_code"])
    return error


def _without_message(name: str, work: Path, tail: str, why: str) -> DpoError:
    """The error of a job that left none."""
    if fault := disk_fault(tail, work, f"stage {name}"):
        return fault
    if why:
        return StageFailed(f"{name} failed: {why}", "Fix the cause, then resume the run")
    log.error("the end of the log of %s:\n%s", name, tail)
    return StageFailed(
        f"{name} exited without an error message; its log is {work / LOG}",
        f"If it ran out of memory: {_LESS_MEMORY}",
    )


def _short_of_memory(message: str) -> bool:
    """Whether a message of a platform or library (torch on GPU and CPU, Python) means too little memory."""
    message = message.lower()
    return any(words in message for words in ("out of memory", "can't allocate memory", "memoryerror"))
