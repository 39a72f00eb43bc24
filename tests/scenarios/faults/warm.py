"""Starts of `dpo` that are cheap enough to be killed a hundred times.

A warm start is a fork of a process that has imported everything and opened nothing: from there on it is the
command line as it is. A cold start is the command itself, with the imports and Prefect's own server.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from urllib.request import urlopen

import psutil

from tests.support.runs import forked
from tests.support.runs.tracked import free_port
from tests.support.runs.training_jobs import wait_until


class Started:
    """One start of the command line, warm or cold."""

    def __init__(self, process: BaseProcess | subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        assert process.pid is not None
        self.pid: int = process.pid

    def ended(self) -> int | None:
        """Its exit status, once it has ended; killed: minus the signal."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def family(self) -> list[psutil.Process]:
        """The flow and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            flow = psutil.Process(self.pid)
            return [flow, *flow.children(recursive=True)]
        return []

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def cut_power(self) -> None:
        """Kill everything at one moment: nobody sees another die."""
        family = self.family()
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(process)
        self.wait()

    def wait(self, seconds: float = 900) -> int:
        wait_until(lambda: self.ended() is not None, f"the end of the run\n{self.said()}", seconds)
        status = self.ended()
        assert status is not None
        return status


def start_cold(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> Started:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    return Started(process, log)


def start_warm(arguments: list[str], folder: Path, log: Path) -> Started:
    place = dict(os.environ), str(folder), str(log)
    process = forked.PROCESSES.Process(target=_command_line, args=(arguments, *place))
    process.start()
    return Started(process, log)


def _command_line(arguments: list[str], env: dict[str, str], folder: str, log: str) -> None:
    os.setsid()
    forked.set_environment(env)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["dpo", *arguments]
    from flows.cli.main import main

    main()


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """A Prefect server on a port of its own; gives its API's address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/api"
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env=os.environ | {"PREFECT_HOME": str(home)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def answers() -> bool:
        with contextlib.suppress(OSError), urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    try:
        wait_until(answers, "Prefect's server")
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
