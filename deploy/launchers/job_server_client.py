"""Starts jobs of one process without loading the libraries again: the client of `dpo_core.job_server`."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from deploy.launchers import torchrun
from dpo_core.system import process_start, write_atomic

log = logging.getLogger("dpo")

PID_FILE = "pid"
"""File in a job's work folder with the id and start time of the process that runs it."""


class ServerGone(Exception):
    """The server cannot be started, or has ended."""


def start_process() -> "subprocess.Popen[str]":
    """Start a job server that reads requests from its standard input."""
    return subprocess.Popen(
        [sys.executable, "-P", "-u", "-m", "dpo_core.job_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=torchrun.environment(),
        text=True,
    )


class JobServer:
    """A process with loaded libraries that forks a run's jobs; it starts with the first job."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    @staticmethod
    def serves(processes: int) -> bool:
        """Whether the server starts jobs of so many ranks; never with a GPU, which a fork cannot inherit."""
        return processes == 1 and not Path("/dev/nvidia0").exists()

    def start(self, job: Path, output: Path) -> "WarmJob":
        """Start a job whose output is appended to a file.

        Raises:
            ServerGone: the server cannot be started, or has ended.
        """
        pid = int(self._ask({"job": str(job), "log": str(output)})["pid"])
        write_atomic(job.parent / PID_FILE, f"{pid} {process_start(pid)}")
        return WarmJob(self, pid)

    def status(self, pid: int) -> int | None:
        """Exit status of a job, negative for a signal; None while it runs.

        Raises:
            ServerGone: the server has ended.
        """
        status: int | None = self._ask({"pid": pid})["status"]
        return status

    def close(self) -> None:
        """End the server and its running jobs."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()
            process.wait(30)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                if "job" not in request:
                    raise ServerGone
                self._process = start_process()
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError as error:
                raise ServerGone from error
            except BaseException:
                # A signal interrupted the exchange, and the next request would read this answer.
                self._close()
                raise
            if not answer:
                raise ServerGone
            parsed: dict[str, Any] = json.loads(answer)
            return parsed


class WarmJob:
    """A job of the server, with the part of `subprocess.Popen` that launchers use."""

    def __init__(self, server: JobServer, pid: int) -> None:
        self._server, self.pid = server, pid

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        try:
            return self._server.status(self.pid)
        except ServerGone:  # its jobs end with it
            return -15

    def wait(self) -> None:
        """Wait until the job has ended."""
        pause = threading.Event()
        while self.poll() is None:
            pause.wait(0.05)
