"""Run a job: write its file, submit it to the launcher, wait for its end, raise its error."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.launchers import Launcher, State
from deploy.launchers.base import LOG
from dpo_core.errors import DpoError, NeedsNewSettings, StageFailed
from dpo_core.jobs.files import ERROR, ModelJob, write_job
from dpo_core.methods.job import Job
from dpo_core.models.remote_code import trusted_digests
from dpo_core.ranks import PROGRESS
from tasks.signals import Stop
from tasks.stages.base import RunningStage
from tasks.store.files import disk_fault

log = logging.getLogger("dpo")

_LESS_MEMORY = (
    "Give it more memory, or lower its micro_batch_size (pack_tokens where it packs) or engine.processes, or "
    "set engine.gradient_checkpointing=true (dpo plan shows the memory it needs)" + NeedsNewSettings.HOW
)


def common_fields(running: RunningStage) -> dict[str, Any]:
    """The fields of every job file except a training's."""
    return {
        "work": str(running.scratch),
        "ranks": running.context.ranks,
        "trusted_code": tuple(trusted_digests()),
    }


def run_model_job(
    running: RunningStage,
    job: ModelJob,
    *,
    total: int = 1,
    unit: str = "steps",
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run a job that samples, scores or evaluates, with a progress bar; returns the result of its rank 0.

    Args:
        total: the units that the job's progress counts.
        unit: what they are, such as answers.
        tick: called at every poll of the job.
    """
    work = Path(job.work)
    bar = running.progress(total, unit)

    def on_poll() -> None:
        bar.update(min(finished_units(work), total))
        tick()

    return run_job(running, job, job.processes, on_poll)


def run_job(
    running: RunningStage, job: ModelJob | Job, processes: int, on_poll: Callable[[], None]
) -> dict[str, Any]:
    """Run one job of a stage to its end; returns the result of its rank 0.

    Args:
        processes: ranks on each node.
        on_poll: called at every poll of the job.

    Raises:
        DpoError: the job failed; the error that it wrote, or one built from its log.
    """
    path = write_job(job)
    work = Path(job.work)
    # The folder identifies the job: its stage, settings and data.
    launcher = running.context.launcher(f"{running.name} {work}", one_rank=getattr(job, "one_rank", False))
    running.mlflow.tag("dpo.command", launcher.render(path, processes))
    try:
        return watch(running.name, launcher, path, processes, running.context.stop, on_poll)
    finally:
        with suppress(FileNotFoundError):
            running.mlflow.artifact(work / LOG, "logs")


def watch(
    name: str,
    launcher: Launcher,
    path: Path,
    processes: int,
    stop: Stop,
    on_poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Submit a job and wait for it. An error or a signal in the meantime cancels the job."""
    work = path.parent
    handle = launcher.submit(path, processes, work)
    pause = launcher.pause / 16  # many jobs are short
    try:
        while True:
            stop.check()
            state = launcher.poll(handle)
            on_poll()
            if state is not State.RUNNING:
                break
            time.sleep(pause)
            pause = min(2 * pause, launcher.pause)
        why = launcher.why(handle) if state is State.FAILED else ""
    except BaseException as error:
        stop.begin(error)
        raise
    finally:
        launcher.cancel(handle)
        with suppress(Exception):
            on_poll()  # a job that is cancelled saves, and may have made another step
    if state is not State.DONE:
        raise _job_error(name, work, launcher.logs(handle), state, why)
    result: dict[str, Any] = json.loads((work / "result.json").read_text())
    return result


def finished_units(work: Path) -> int:
    """The units that the ranks of a job have finished, in total."""
    return sum(int(path.read_text()) for path in work.glob(PROGRESS.format(rank="*")))


def _job_error(name: str, work: Path, tail: str, state: State, why: str) -> DpoError:
    """The error of a job that failed or was stopped, with the exit code that the job wrote."""
    if state is State.STOPPED:
        return StageFailed(f"{name} was stopped and saved its state", "Resume the run")
    if _short_of_memory(why):  # the other ranks only report that one was killed
        return StageFailed(f"{name} failed: {why}", _LESS_MEMORY)
    try:
        written = json.loads((work / ERROR).read_text())
    except (OSError, ValueError):
        return _error_without_message(name, work, tail, why)
    if fault := disk_fault(written["problem"], work, f"stage {name}"):
        return fault
    remedy = _LESS_MEMORY if _short_of_memory(written["problem"]) else written["remedy"]
    error_class = StageFailed if written.get("resumable", True) else NeedsNewSettings
    error = error_class(f"{name}: {written['problem']}", remedy)
    error.exit_code = int(written["exit_code"])
    return error


def _error_without_message(name: str, work: Path, tail: str, why: str) -> DpoError:
    """The error of a job that wrote none."""
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
    """True if a message of a platform or library (torch on GPU or CPU, Python) reports too little memory."""
    message = message.lower()
    return any(words in message for words in ("out of memory", "can't allocate memory", "memoryerror"))
