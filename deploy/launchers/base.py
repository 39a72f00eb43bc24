"""The interface of all launchers: submit, poll and cancel a job, and read its log."""

import signal
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Protocol

RESULT, ERROR, STOPPED, LOG = "result.json", "error.json", "stopped", "job.log"
"""Files that a job and its launcher write to the work folder."""


class State(Enum):
    """State of a job."""

    RUNNING = "running"
    """Running, queued, or about to restart after a node was lost."""
    DONE = "done"
    STOPPED = "stopped"
    """Ended on request, after saving a checkpoint."""
    FAILED = "failed"


class Launcher(Protocol):
    """Starts one training job and watches it."""

    pause: float
    """Seconds between two polls, long enough for a busy scheduler."""

    def render(self, job: Path, processes: int) -> str:
        """The command or manifest that `submit` would use; starts nothing."""
        ...

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Start the job; returns a handle. `work` receives its log."""
        ...

    def poll(self, handle: str) -> State:
        """The job's state now."""
        ...

    def why(self, handle: str) -> str:
        """The platform's reason for the job's state; empty if it has none."""
        ...

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Ask the job to save and end; kill what is left of it after `grace` seconds."""
        ...

    def logs(self, handle: str, lines: int = 50) -> str:
        """The end of the job's output."""
        ...


def final_state(work: Path) -> State:
    """State of a job that no longer runs, from the files that it wrote.

    Exit codes do not tell: torchrun exits with 1 whatever its ranks return, and schedulers report that.
    """
    if (work / RESULT).exists():
        return State.DONE
    stopped = (work / STOPPED).exists() and not (work / ERROR).exists()
    return State.STOPPED if stopped else State.FAILED


def command_end(status: str) -> str:
    """How a job's command ended; names the signal that shells and kubelets report as 128 plus its number."""
    name = ""
    with suppress(ValueError):
        name = f" ({signal.Signals(int(status) - 128).name})"
    return f"its command ended with status {status}{name}"


def clear(work: Path) -> None:
    """Remove the result files of an earlier job, and create the log."""
    for leftover in (RESULT, ERROR, STOPPED):
        (work / leftover).unlink(missing_ok=True)
    (work / LOG).touch()


def tail(work: Path, lines: int) -> str:
    """The last lines of the log in the work folder; empty if there is no log."""
    log = work / LOG
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
