"""A sandbox run as an ordinary user, and what is seen of a sandbox from outside."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pydantic

from dpo_core.evaluation.sandbox import Limits, ProgramResult

CHECKOUT = Path(__file__).resolve().parents[2]
SERVE = """
import json, sys
from dataclasses import asdict
from dpo_core.errors import StageFailed
from dpo_core.evaluation.sandbox import Limits, run_python
for line in sys.stdin:
    job = json.loads(line)
    try:
        answer = asdict(run_python(job["code"], Limits(**job["limits"])))
    except StageFailed as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer), flush=True)
"""


class OrdinaryUser:
    """Runs programs from a process of user 65534. Raises OSError where that user can run no Python."""

    def __init__(self) -> None:
        # An interpreter in root's home is closed to others; the system's may be of the same version.
        packages = Path(pydantic.__file__).parents[1]
        found = []
        for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
            environment = {"PYTHONPATH": f"{CHECKOUT}:{packages}", "PATH": "/usr/bin:/bin"}
            options: dict[str, Any] = {
                "user": 65534, "group": 65534, "extra_groups": [], "env": environment, "cwd": "/",
            }  # fmt: skip
            try:
                subprocess.run(
                    [python, "-c", "import dpo_core.evaluation.sandbox"],
                    check=True, capture_output=True, **options,
                )  # fmt: skip
            except (OSError, subprocess.CalledProcessError):
                continue
            found.append((python, options))
        if not found:
            raise OSError("no interpreter and checkout that user 65534 may read")
        python, options = found[0]
        self.process = subprocess.Popen(
            [python, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
        )

    def __call__(self, code: str, limits: Limits) -> ProgramResult:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"code": code, "limits": limits.model_dump()}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "refused" not in answer, answer
        return ProgramResult(**answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Seen:
    """The processes that a run started, as the machine outside saw them."""

    def __init__(self) -> None:
        self.processes: set[psutil.Process] = set()
        self.most = 0
        self.most_bytes = 0
        self.namespaces: list[dict[str, str]] = []

    def left(self) -> list[psutil.Process]:
        return [process for process in self.processes if process.is_running()]

    def look(self, below: psutil.Process, before: set[psutil.Process]) -> None:
        found = set(below.children(recursive=True)) - before
        self.processes |= found
        programs = [process for process in found if is_program(process)]
        size = 0
        for process in programs:
            with suppress(psutil.Error):
                size += process.memory_info().rss
        self.most, self.most_bytes = max(self.most, len(programs)), max(self.most_bytes, size)
        if programs:
            self.namespaces.append(namespaces(programs[0].pid))


@contextmanager
def watched(pid: int | None = None) -> Iterator[Seen]:
    """Looks every few milliseconds at what runs below a process (this one), until the block is left."""
    below, seen, over = psutil.Process(pid), Seen(), threading.Event()
    before = set(below.children(recursive=True))

    def look() -> None:
        while not over.wait(0.02):
            seen.look(below, before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def namespaces(pid: int | str) -> dict[str, str]:
    names = ("user", "mnt", "net", "pid", "ipc", "uts", "cgroup")
    try:
        return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in names}
    except OSError:
        return {}


def is_program(process: psutil.Process) -> bool:
    """Whether a process is one of a program, and not of the sandbox around it."""
    try:
        # Process 1 of the sandbox is the same interpreter, and a child of bwrap.
        own, above = process.cmdline()[:1], process.parent()
        return own == ["/python/bin/python"] and above is not None and above.name() != "bwrap"
    except psutil.Error:  # it has just ended
        return False


def why_no_sandbox() -> str:
    """Why there is none on this machine; empty where bubblewrap works, and the sandbox must work then."""
    try:
        command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return "bubblewrap is not installed (apt-get install bubblewrap libseccomp2)"
    return done.stderr.strip() if done.returncode else ""
