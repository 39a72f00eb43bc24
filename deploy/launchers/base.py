"""The protocol of every launcher: the same job file, the same verbs, on a laptop and on a cluster."""

from enum import Enum
from pathlib import Path
from typing import Protocol

RESULT, ERROR, STOPPED, LOG = "result.json", "error.json", "stopped", "job.log"
"""What a job and its launcher leave in the work folder."""


class State(Enum):
    """Where a job stands."""

    RUNNING = "running"
    """Running, or waiting for its turn, or about to be started again after a loss."""
    DONE = "done"
    STOPPED = "stopped"
    """Ended on purpose, with its state saved."""
    FAILED = "failed"


class Launcher(Protocol):
    """Starts one training job and watches it."""

    pause: float
    """Seconds to let pass between two polls; a busy scheduler is not asked more often."""

    def render(self, job: Path, processes: int) -> str:
        """What would be run, as text; starts nothing."""
        ...

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Start the job; returns a handle. `work` receives its log."""
        ...

    def poll(self, handle: str) -> State:
        """Where the job stands now."""
        ...

    def why(self, handle: str) -> str:
        """What the platform says of the job's state, in words; empty where it says nothing of its own."""
        ...

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Ask the job to save and end; after `grace` seconds no process of it lives."""
        ...

    def logs(self, handle: str, lines: int = 50) -> str:
        """The end of the job's output."""
        ...


def ended(work: Path) -> State:
    """How a job that no longer runs has ended.

    Files tell it: torchrun answers 1 whatever its ranks said, and a scheduler passes that on.
    """
    if (work / RESULT).exists():
        return State.DONE
    stopped = (work / STOPPED).exists() and not (work / ERROR).exists()
    return State.STOPPED if stopped else State.FAILED


def clear(work: Path) -> None:
    """Remove what an earlier job left, which says nothing about the next, and begin the log."""
    for leftover in (RESULT, ERROR, STOPPED):
        (work / leftover).unlink(missing_ok=True)
    (work / LOG).touch()


def tail(work: Path, lines: int) -> str:
    """The last lines of the log in the work folder; empty where there is none."""
    log = work / LOG
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
