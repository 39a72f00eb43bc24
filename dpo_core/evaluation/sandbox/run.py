"""Runs Python code that a model wrote, in a sandbox without network and files and with limited resources.

The program sees the interpreter with its standard library and the system's libraries, read-only, and an empty
folder in memory. It runs as an unprivileged user in its own namespaces (users, mounts, network, processes,
IPC), without environment variables other than `PYTHONHASHSEED`, and with limits on every resource. If any
part of this cannot be set up, the program is not run.

`passed` means that the process that started the program reached its last line: it then writes a random token
to a private pipe. Any earlier exit with status 0 does not pass. A check within one process cannot rule out
a program that searches the interpreter's frames for the token, or an answer whose `__eq__` is always true.

Memory and processor time are limited per process, so that a program may use `processes` times as much; the
wall time is limited for all of them together.
"""

import marshal
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import StageFailed

Outcome = Literal["passed", "failed", "timeout", "output", "killed"]
REMEDY = (
    "Code of a model runs in Linux namespaces only (kernel 5.14 or newer). Allow them for this user: sysctl "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0; in a container, a "
    "seccomp profile that permits unshare and mount. Or remove the suites that run code"
)
_TAIL = 4096  # last bytes of the output that are kept
_SETUP_SECONDS = 60  # time to set up the sandbox on a busy machine


class Limits(Config):
    """Resource limits of a program."""

    cpu_seconds: int = Field(5, ge=1)
    """Processor time of each process."""
    wall_seconds: float = Field(10.0, gt=0)
    """From the start of the interpreter to the end of all its processes."""
    memory_mb: int = Field(512, ge=64)
    """Address space of each process."""
    processes: int = Field(8, ge=1)
    """Processes and threads at once, including the first."""
    file_mb: int = Field(8, ge=1)
    """Size of all files together, and of each; they are in memory."""
    open_files: int = Field(32, ge=16)
    output_kb: int = Field(4096, ge=1)
    """Output to stdout and stderr together; a program that prints more is stopped."""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Args:
        outcome: `passed`: it reached its last line; `failed`: it raised or exited before; `timeout`: it
            exceeded its wall or processor time; `output`: it printed too much; `killed`: another signal.
        status: exit status, negative for a signal; None if the sandbox stopped it.
        tail: the last characters of its output, stdout and stderr together.
    """

    outcome: Outcome
    status: int | None
    tail: str
    seconds: float


def run_python(code: str, limits: Limits = Limits()) -> ProgramResult:  # noqa: B008  (frozen)
    """Run one program in its own sandbox, which is gone when this returns. Thread-safe.

    Raises:
        StageFailed: the sandbox cannot be set up; the program has not run.
    """
    check_sandbox()
    return _run(code, limits)


def run_many(
    programs: Sequence[str],
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    threads: int | None = None,
) -> list[ProgramResult]:
    """`run_python` of each program, in order, several at once.

    Args:
        threads: sandboxes at once; None: twice the number of processors, because part of a run waits for
            the kernel to remove the namespaces.
    """
    check_sandbox()
    with ThreadPoolExecutor(threads or 2 * len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda code: _run(code, limits), programs))


@cache
def check_sandbox() -> None:
    """Check once that a program runs and that it is isolated.

    Raises:
        StageFailed: it is not.
    """
    if not sys.platform.startswith("linux"):
        raise StageFailed(f"there is no sandbox for model-written code on {sys.platform}", REMEDY)
    result = _run(_PROBE, Limits(wall_seconds=30.0, processes=3))
    if result.outcome != "passed":
        reason = result.tail.strip()[-300:] or f"its check ended with {result.outcome}"
        raise StageFailed(f"the sandbox for model-written code does not work here: {reason}", REMEDY)


_PROBE = """
import os, time, _socket
assert os.getuid() == os.geteuid() == 1000, "the program is not an unprivileged user"
assert set(os.listdir("/")) <= {"dev", "etc", "lib", "lib64", "python", "tmp", "usr"}, os.listdir("/")
assert set(os.environ) <= {"PYTHONHASHSEED", "LD_LIBRARY_PATH", "LC_CTYPE"}, "the environment is not empty"
try:
    _socket.socket()
except PermissionError:
    pass
else:
    raise AssertionError("a socket can be opened")
children = 0
try:
    while children < 8:
        if os.fork() == 0:
            while True:
                time.sleep(1)
        children += 1
except BlockingIOError:
    pass
assert children == 2, "the number of processes is not limited"
"""


def _run(code: str, limits: Limits) -> ProgramResult:
    token = secrets.token_hex(16)
    result, program_end = os.pipe()
    try:
        process = subprocess.Popen(
            [_python(), "-I", "-S", str(Path(__file__).with_name("namespaces.py")), str(program_end)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            pass_fds=[program_end], env={}, cwd="/", start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(result)
        raise
    finally:
        os.close(program_end)
    with process, open(result, "rb", buffering=0) as written:
        watch = _Watch(process, limits)
        try:
            watch.send(_job(code, token, limits))
            watch.until_end()
        finally:
            process.terminate()  # it exits when all processes of its namespace have ended
            process.wait()
        # Nobody holds the other end any more, so this does not block.
        return watch.result(written.read(len(token) + 1) == token.encode())


def _python() -> str:
    """The interpreter itself, not a virtual environment's symbolic link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def _job(code: str, token: str, limits: Limits) -> bytes:
    megabyte = 2**20
    ceilings = {
        "RLIMIT_AS": limits.memory_mb * megabyte,
        "RLIMIT_FSIZE": limits.file_mb * megabyte,
        "RLIMIT_NOFILE": limits.open_files,
        **dict.fromkeys(("RLIMIT_CORE", "RLIMIT_MSGQUEUE", "RLIMIT_MEMLOCK", "RLIMIT_RTPRIO"), 0),
    }
    job = {
        "code": code,
        "token": token,
        "binds": _binds(),
        "file_bytes": limits.file_mb * megabyte,
        "processes": limits.processes,
        # SIGXCPU first, which shows the reason; SIGKILL for a program that ignores it.
        "rlimits": {"RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1)}
        | {name: (value, value) for name, value in ceilings.items()},
        "longest": limits.wall_seconds + 2 * _SETUP_SECONDS,
        # A fixed order of sets; libraries of an interpreter that was built elsewhere.
        "environment": {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": "/python/lib"},
    }
    return marshal.dumps(job)


def _binds() -> dict[str, str]:
    """Mounts of the program by the path inside: interpreter, standard library, system libraries."""
    paths = {f"/python/{lib}": f"{sys.base_prefix}/{lib}" for lib in ("lib", "lib64")}
    same = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
    paths |= {path: path for path in (*same, "/dev/null", "/dev/zero", "/dev/urandom")}
    binds = {inside: os.path.realpath(path) for inside, path in paths.items() if os.path.exists(path)}
    return binds | {"/python/bin/python": _python()}


class _Watch:
    """Reads the sandbox's reports and the program's output, and applies the limits on time and output."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self.process, self.limits = process, limits
        self.report = bytearray()
        self.tail = bytearray()
        self.printed = 0
        self.started: float | None = None
        self.seconds = 0.0
        self.stopped: Outcome | None = None

    def send(self, job: bytes) -> None:
        assert self.process.stdin is not None
        # A process that has exited has reported why.
        with suppress(BrokenPipeError), self.process.stdin as stdin:
            rest = memoryview(job)
            while rest:
                rest = rest[stdin.write(rest) :]

    def until_end(self) -> None:
        """Return when all processes have ended, or with `stopped` set when they must be stopped."""
        deadline = time.monotonic() + _SETUP_SECONDS
        with selectors.DefaultSelector() as open_pipes:
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe is not None
                open_pipes.register(pipe, selectors.EVENT_READ)
            while open_pipes.get_map() and self.stopped is None:
                for key, _ in open_pipes.select(max(deadline - time.monotonic(), 0)):
                    part = os.read(key.fd, 65536)
                    if not part:
                        open_pipes.unregister(key.fileobj)
                    elif key.fileobj is self.process.stdout:
                        self.report += part
                        if self.started is None and b"ready" in self.report:
                            self.started = time.monotonic()
                            deadline = self.started + self.limits.wall_seconds
                    else:
                        self._print(part)
                if time.monotonic() >= deadline and open_pipes.get_map():
                    self.stopped = self.stopped or "timeout"
        if self.started is not None:
            self.seconds = time.monotonic() - self.started

    def _print(self, part: bytes) -> None:
        self.tail = (self.tail + part)[-_TAIL:]
        self.printed += len(part)
        if self.printed > self.limits.output_kb * 1024:
            self.stopped = "output"

    def result(self, token_received: bool) -> ProgramResult:
        """The result, after all processes have ended.

        Args:
            token_received: whether the program's token arrived, and nothing else.
        """
        reports = dict(line.partition(" ")[::2] for line in self.report.decode(errors="replace").splitlines())
        tail = self.tail.decode(errors="replace")
        if "error" in reports or self.started is None:
            reason = reports.get("error") or tail[-300:] or f"it was not set up within {_SETUP_SECONDS} s"
            raise StageFailed(f"the sandbox for model-written code cannot be set up here: {reason}", REMEDY)
        if self.stopped is not None:
            return ProgramResult(self.stopped, None, tail, self.seconds)
        status = int(reports["status"]) if "status" in reports else None
        outcome: Outcome = "failed"
        if status == 0 and token_received:
            outcome = "passed"
        elif status is None or status < 0:
            outcome = "timeout" if status == -signal.SIGXCPU else "killed"
        return ProgramResult(outcome, status, tail, self.seconds)
