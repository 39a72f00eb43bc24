"""The protocol of every launcher: the same job file, the same verbs, on a laptop and on a cluster."""

from enum import Enum
from pathlib import Path
from typing import Protocol


class State(Enum):
    """Where a job stands."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    """Ended on purpose, with its state saved."""
    FAILED = "failed"


class Launcher(Protocol):
    """Starts one training job and watches it."""

    def render(self, job: Path, processes: int) -> str:
        """What would be run, as text; starts nothing."""
        ...

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Start the job; returns a handle. `work` receives its log."""
        ...

    def poll(self, handle: str) -> State:
        """Where the job stands now."""
        ...

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Ask the job to save and end; after `grace` seconds no process of it lives."""
        ...

    def logs(self, handle: str, lines: int = 50) -> str:
        """The end of the job's output."""
        ...
