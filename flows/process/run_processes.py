"""Marks the processes of a run, finds those of runs that are gone, and ends those of one run.

Usually the run's supervisor (`flows.process.guard`) ends them. If it was killed too, the next run ends the
ranks of a job that it restarts (`deploy.launchers.local`).
"""

import contextlib
import os
from collections.abc import Iterable

import psutil

from dpo_core.system import RUN_MARK


def mark_own() -> None:
    """Mark processes started from now on with this process's id."""
    os.environ[RUN_MARK] = str(os.getpid())


def find_orphans() -> list[psutil.Process]:
    """The processes of runs that are gone."""
    orphans = []
    for process in psutil.process_iter(["uids"]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
            owner = process.environ().get(RUN_MARK) if process.info["uids"].real == os.getuid() else None
            if owner and not psutil.pid_exists(int(owner)):
                orphans.append(process)
    return orphans


def end_processes_of(owner: int, but: Iterable[int] = (), grace: float = 15.0) -> None:
    """End all processes started by the run with this process id; trainers get `grace` seconds to save."""
    alive = _processes_of(owner, but)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(alive, timeout=grace)
    for process in _processes_of(owner, but):  # search again: new ones may have started
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _processes_of(owner: int, but: Iterable[int]) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        # Skip other users' processes, which are not readable.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(RUN_MARK) == str(owner) and process.pid not in but:
                processes.append(process)
    return processes
