"""The launcher for this machine: runs a job as a child process, with torchrun if it has several ranks."""

import contextlib
import importlib.util
import logging
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from deploy.launchers import torchrun
from deploy.launchers.base import LOG, State, clear, final_state, tail
from deploy.launchers.job_server_client import PID_FILE, JobServer, ServerGone, WarmJob
from dpo_core.errors import StageFailed
from dpo_core.system import INSTALL_JOB_PACKAGES, JOB_PACKAGES, ending_with_parent, process_start

MODULE = torchrun.MODULE

log = logging.getLogger("dpo")


class LocalLauncher:
    """Starts jobs on this machine.

    The child stays in the flow's process group: a Prefect worker that cancels a run kills that group, and a
    child in its own session would continue unseen. If the flow is killed, the child gets SIGTERM and saves.

    Args:
        no_grace: while it is set, cancelled jobs get no time to save.
        server: starts jobs of one process, if given.
    """

    pause = 0.5

    def __init__(self, no_grace: threading.Event | None = None, server: JobServer | None = None) -> None:
        self._no_grace = no_grace or threading.Event()
        self._server = server
        self._jobs: dict[str, tuple[subprocess.Popen[bytes] | WarmJob, Path, Path]] = {}
        self._before: dict[str, tuple[int, int]] = {}  # log length and out-of-memory kills at the start

    def command(self, job: Path, processes: int) -> list[str]:
        """The command line of a job."""
        return torchrun.command(job, processes, module=MODULE)

    def render(self, job: Path, processes: int) -> str:
        return shlex.join(self.command(job, processes))

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """End processes of this job that a killed flow left, then start it.

        Raises:
            StageFailed: a package that jobs need is not installed.
        """
        job = job.absolute()
        # Two trainers in one folder would corrupt its checkpoints.
        _end(job, 10.0, self._no_grace)
        clear(work)
        require_packages_of_jobs()
        before = (work / LOG).stat().st_size, _out_of_memory_kills()
        process = self._start(job, processes, work / LOG)
        handle = str(process.pid)
        self._jobs[handle] = (process, job, work)
        self._before[handle] = before
        return handle

    def _start(self, job: Path, processes: int, log_file: Path) -> "subprocess.Popen[bytes] | WarmJob":
        if self._server is not None and self._server.serves(processes):
            try:
                return self._server.start(job, log_file)
            except ServerGone:
                log.warning("the warm process ended unexpectedly; the job starts in a new one")
        with log_file.open("ab") as output:
            return subprocess.Popen(
                ending_with_parent(self.command(job, processes)),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=torchrun.environment(),
            )

    def poll(self, handle: str) -> State:
        process, _, work = self._jobs[handle]
        if process.poll() is None:
            return State.RUNNING
        state = final_state(work)
        # When a rank is killed, torchrun stops the others, which save and report "stopped".
        return State.FAILED if state is State.STOPPED and self.why(handle) else state

    def why(self, handle: str) -> str:
        """Says whether a process of the job was killed, and whether because of memory."""
        process, _, work = self._jobs[handle]
        length, kills = self._before[handle]
        with (work / LOG).open("rb") as log:
            log.seek(length)
            killed = process.poll() == -signal.SIGKILL or _KILLED.search(log.read())
        if not killed:
            return ""
        if _out_of_memory_kills() > kills:
            return "out of memory: the kernel killed one of its processes"
        return "one of its processes was killed (SIGKILL); the kernel reports no kill for memory"

    def cancel(self, handle: str, grace: float = 20.0) -> None:
        process, job, _ = self._jobs[handle]
        _end(job, grace, self._no_grace)
        process.wait()

    def logs(self, handle: str, lines: int = 50) -> str:
        _, _, work = self._jobs[handle]
        return tail(work, lines)


def require_packages_of_jobs() -> None:
    """Refuse to start a job without the packages of the extra `train`.

    Raises:
        StageFailed: a package is missing; the message names it.
    """
    missing = [name for name in JOB_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise StageFailed(
            f"the job cannot start on this machine: {', '.join(missing)} not installed",
            f"Run: {INSTALL_JOB_PACKAGES}; or start jobs on a cluster with dpo launch",
        )


# How torchrun reports a killed rank.
_KILLED = re.compile(rb"Signal 9 \(SIGKILL\) received|exitcode\s*:\s*-9\b")


def _out_of_memory_kills() -> int:
    """Number of processes that this machine's kernel killed for memory, in all containers."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as numbers:
        for line in numbers:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _torchrun_and_ranks(job: Path) -> list[psutil.Process]:
    """The processes of a job, by their command lines, torchrun first; a warm one by its pid file.

    Parent processes do not tell: ranks outlive a torchrun that was killed and become children of process 1.
    """
    processes = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if {MODULE, str(job)} <= set(process.info["cmdline"] or ())
    ]
    processes.sort(key=lambda process: process.info["create_time"])
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        pid, born = map(int, (job.parent / PID_FILE).read_text().split())
        if process_start(pid) == born:
            processes.append(psutil.Process(pid))
    return processes


def _with_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """These processes in order, then their descendants."""
    family = dict.fromkeys(processes)
    for process in list(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= dict.fromkeys(process.children(recursive=True))
    return list(family)


def _end(job: Path, grace: float, no_grace: threading.Event) -> None:
    """Send SIGTERM to torchrun and its ranks, and SIGKILL to what is left after the grace time."""
    processes = _torchrun_and_ranks(job)
    alive = _with_children(processes)
    for process in processes:
        # To ranks too: a torchrun that already got a signal as part of the flow's group aborts at the second,
        # maybe before it has signalled its ranks.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + grace
    while (alive := _living(alive)) and time.monotonic() < deadline and not no_grace.is_set():
        time.sleep(0.05)
    alive = _freeze(alive)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + 5.0
    while _living(alive) and time.monotonic() < deadline:
        time.sleep(0.05)


def _living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended. psutil's `wait_procs` waits until a forked job's server collects it."""
    living = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _freeze(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Suspend these processes and all their descendants, so that none can start another.

    A child that starts after the list was made would otherwise outlive its killed parent unnoticed.
    """
    frozen: dict[psutil.Process, None] = {}
    while new := [process for process in _with_children(processes) if process not in frozen]:
        for process in new:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        frozen |= dict.fromkeys(new)
        processes = list(frozen)
    return processes
