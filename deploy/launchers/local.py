"""Jobs on this machine: one rank, or torchrun with several, as a child in the flow's own process group."""

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
from deploy.launchers.base import LOG, State, clear, ended, tail
from deploy.launchers.warm import PID_FILE, JobServer, ServerGone, WarmJob
from dpo_core.errors import StageFailed
from dpo_core.system import INSTALL_JOB_PACKAGES, JOB_PACKAGES, birth

MODULE = torchrun.MODULE

log = logging.getLogger("dpo")


class LocalLauncher:
    """Jobs beside the flow.

    The child stays in the flow's process group: a Prefect worker that cancels a run kills that group, and a
    child in a session of its own would go on training unseen.

    Args:
        hurry: while it is set, jobs that are cancelled are given no time to save.
        server: starts jobs of one process, where there is one.
    """

    pause = 0.5

    def __init__(self, hurry: threading.Event | None = None, server: JobServer | None = None) -> None:
        self._hurry = hurry or threading.Event()
        self._server = server
        self._jobs: dict[str, tuple[subprocess.Popen[bytes] | WarmJob, Path, Path]] = {}
        self._before: dict[str, tuple[int, int]] = {}  # length of the log, and kills for memory until then

    def command(self, job: Path, processes: int) -> list[str]:
        """The command line of a job."""
        return torchrun.command(job, processes, module=MODULE)

    def render(self, job: Path, processes: int) -> str:
        return shlex.join(self.command(job, processes))

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Start the job, once whatever a killed flow left running on it is ended.

        Raises:
            StageFailed: a package that jobs need is not installed.
        """
        job = job.absolute()
        # Two trainers on one folder would ruin its checkpoints.
        _end(job, 10.0, self._hurry)
        clear(work)
        require_packages_of_jobs()
        before = (work / LOG).stat().st_size, _kills_for_memory()
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
                self.command(job, processes),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=torchrun.environment(),
            )

    def poll(self, handle: str) -> State:
        process, _, work = self._jobs[handle]
        if process.poll() is None:
            return State.RUNNING
        state = ended(work)
        # torchrun stops the other ranks of one that was killed, and these save their state.
        return State.FAILED if state is State.STOPPED and self.why(handle) else state

    def why(self, handle: str) -> str:
        """Whether a process of the job was killed, which it could not say itself, and whether for memory."""
        process, _, work = self._jobs[handle]
        length, kills = self._before[handle]
        with (work / LOG).open("rb") as log:
            log.seek(length)
            killed = process.poll() == -signal.SIGKILL or _KILLED.search(log.read())
        if not killed:
            return ""
        if _kills_for_memory() > kills:
            return "out of memory: the kernel killed a process of it"
        return "a process of it was killed (SIGKILL), and the kernel does not say that it was for memory"

    def cancel(self, handle: str, grace: float = 20.0) -> None:
        process, job, _ = self._jobs[handle]
        _end(job, grace, self._hurry)
        process.wait()

    def logs(self, handle: str, lines: int = 50) -> str:
        _, _, work = self._jobs[handle]
        return tail(work, lines)


def require_packages_of_jobs() -> None:
    """Refuse to start a job in an environment without the extra `train`.

    Raises:
        StageFailed: it names the packages that are missing.
    """
    missing = [name for name in JOB_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise StageFailed(
            f"the job cannot start on this machine: {', '.join(missing)} not installed",
            f"Run: {INSTALL_JOB_PACKAGES}; or start jobs on a cluster: dpo launch --on",
        )


# What torchrun says of a rank.
_KILLED = re.compile(rb"Signal 9 \(SIGKILL\) received|exitcode\s*:\s*-9\b")


def _kills_for_memory() -> int:
    """How many processes the kernel of this machine has killed for memory, in all containers."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as numbers:
        for line in numbers:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _torchrun_and_ranks(job: Path) -> list[psutil.Process]:
    """The processes of a job: told by their command lines, torchrun first, or by the file of a warm one.

    Not by parenthood alone: torchrun gives each rank a session of its own, so that ranks outlive a torchrun
    that was killed and then hang below process 1.
    """
    named = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if {MODULE, str(job)} <= set(process.info["cmdline"] or ())
    ]
    named.sort(key=lambda process: process.info["create_time"])
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        pid, born = map(int, (job.parent / PID_FILE).read_text().split())
        if birth(pid) == born:
            named.append(psutil.Process(pid))
    return named


def _with_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """These processes, in order, and all that they started, each once."""
    family = dict.fromkeys(processes)
    for process in list(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= dict.fromkeys(process.children(recursive=True))
    return list(family)


def _end(job: Path, grace: float, hurry: threading.Event) -> None:
    """SIGTERM to torchrun and its ranks; SIGKILL to whoever lives after the grace time."""
    named = _torchrun_and_ranks(job)
    alive = _with_children(named)
    for process in named:
        # To each: a torchrun that a signal to the flow's group has reached before breaks off what it is doing
        # at a second one, and might not have told its ranks yet.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + grace
    while alive and time.monotonic() < deadline and not hurry.is_set():
        _, alive = psutil.wait_procs(alive, timeout=min(0.2, grace))
    alive = _freeze(alive)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _freeze(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Stop these processes and what they have started meanwhile, until none of them can start another.

    A child that is born after the list was made, and whose parent is then killed, would be nobody's.
    """
    frozen: dict[psutil.Process, None] = {}
    while new := [process for process in _with_children(processes) if process not in frozen]:
        for process in new:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        frozen |= dict.fromkeys(new)
        processes = list(frozen)
    return processes
