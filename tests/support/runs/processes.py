"""The processes of a run's jobs, told from those that start and watch them."""

from collections.abc import Iterable

import psutil


def jobs_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The ranks: forked from the warm process, or started by a command line of their own."""
    ranks = []
    for process in processes:
        try:
            command, parent = process.cmdline(), process.parent()
            forked = parent is not None and "dpo_core.job_server" in parent.cmdline()
        except psutil.NoSuchProcess:
            continue
        if forked or {"-u", "dpo_core.job"} <= set(command):
            ranks.append(process)
    return ranks
