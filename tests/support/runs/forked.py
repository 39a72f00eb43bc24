"""Processes forked from one that has loaded the libraries: loading them takes longer than most tests.

What runs is the real command line, job server and rank; only the start of the interpreter is shared. Tests of
starting, killing and supervising processes start them as a user does.
"""

import atexit
import contextlib
import functools
import io
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import psutil

from deploy.launchers import job_server_client, torchrun
from deploy.launchers.base import LOG
from tests.support.runs.tracked import free_port

Main = Callable[[list[str]], int]

PROCESSES = multiprocessing.get_context("forkserver")
"""Starts processes that have loaded the libraries; all tests share one server and its list of modules."""
PROCESSES.set_forkserver_preload(["tests.support.runs.preload"])


def start_server() -> str:
    """Start the process that tests fork from, which loads in the background; its address."""
    server: Any = multiprocessing.forkserver._forkserver
    server.ensure_running()
    return str(server._forkserver_address)


def dpo(
    arguments: Sequence[str], *, env: dict[str, str], cwd: Path, timeout: float = 1500
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with a job server that has loaded its libraries."""
    command = ["dpo", *arguments]
    server = _job_server(env)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("out", "err")]
        process = _start(_command, command, server, env=env, cwd=cwd, outputs=outputs)
        server.connection.close()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, *(path.read_text() for path in outputs))
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in outputs))


def ranks(job: Path, processes: int, main: Main | None = None, **env: str) -> list[int]:
    """Run the ranks of a job to their end, as torchrun does: if one fails, the others are ended.

    Returns:
        Exit status of each rank, negative for a signal.
    """
    started = start_ranks(job, processes, main, **env)
    while any(process.exitcode is None for process in started):
        if any(process.exitcode for process in started):
            for process in started:
                process.terminate()
        time.sleep(0.02)
    return [process.exitcode or 0 for process in started]


def start_ranks(job: Path, processes: int, main: Main | None = None, **env: str) -> list[BaseProcess]:
    """Start the ranks of a job on this machine; their output goes to the launcher's log.

    Args:
        main: the entry point of a rank; by default that of `dpo_core.job`.
        env: more variables.
    """
    shared = torchrun.environment() | env
    if processes > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        shared |= {"LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        arguments = (main, ["--config", str(job)])
        log = [job.parent / LOG] * 2
        started.append(_start(_rank, *arguments, env=shared | own, cwd=Path.cwd(), outputs=log))
    return started


@contextlib.contextmanager
def job_servers(start: Callable[[], "_JobServer"] | None = None) -> Iterator[None]:
    """Let runs of this process have job servers that have loaded their libraries."""
    before = job_server_client.start_process
    job_server_client.start_process = start or (lambda: _job_server(torchrun.environment()))  # type: ignore
    try:
        yield
    finally:
        job_server_client.start_process = before


def set_environment(env: dict[str, str]) -> None:
    """Replace the variables of a forked process, and what Prefect read of them when it was loaded."""
    from prefect.context import refresh_global_settings_context

    os.environ.clear()
    os.environ.update(env)
    refresh_global_settings_context()


def _start(target: Any, *arguments: Any, env: dict[str, str], cwd: Path, outputs: list[Path]) -> BaseProcess:
    process = PROCESSES.Process(target=_become, args=(target, arguments, env, str(cwd), outputs))
    process.start()
    return process


def _become(
    target: Any, arguments: tuple[Any, ...], env: dict[str, str], cwd: str, outputs: list[Path]
) -> None:
    set_environment(env)
    os.chdir(cwd)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, "wb"), line_buffering=True) for number in (1, 2)
    )
    status = 1
    try:
        status = target(*arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(status)


def _command(words: list[str], server: "_JobServer") -> int:
    from flows.cli.main import main

    sys.argv = words
    with job_servers(lambda: server):
        main()
    return 0


def _rank(main: Main | None, arguments: list[str]) -> int:
    from dpo_core import job

    return (main or job.main)(arguments)


@dataclass
class _JobServer:
    """What the client of a job server uses of `subprocess.Popen`."""

    connection: Connection
    pid: int

    @functools.cached_property
    def stdin(self) -> TextIO:
        return os.fdopen(os.dup(self.connection.fileno()), "w")

    @functools.cached_property
    def stdout(self) -> TextIO:
        return os.fdopen(self.connection.fileno(), "r", closefd=False)

    def poll(self) -> int | None:
        return None if psutil.pid_exists(self.pid) else 0

    def wait(self, timeout: float = 60) -> int:
        self.connection.close()
        psutil.wait_procs([psutil.Process(self.pid)] if psutil.pid_exists(self.pid) else [], timeout)
        return 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _job_server(env: dict[str, str]) -> _JobServer:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_serve, args=(theirs, env))
    process.start()
    theirs.close()
    assert process.pid
    return _JobServer(ours, process.pid)


def _serve(connection: Connection, env: dict[str, str]) -> None:
    from dpo_core import job_server

    set_environment(env)
    for number in (0, 1):
        os.dup2(connection.fileno(), number)
    connection.close()
    sys.stdin = os.fdopen(0)
    sys.exit(job_server.main())
