"""Runs Python code that a model wrote: no network, no files of this machine, bounded resources.

The program sees the interpreter with its standard library and the system's libraries, read-only, and an empty
folder in memory; it is a user without rights in namespaces of its own (users, mounts, network, processes,
IPC), with no environment but `PYTHONHASHSEED`, and limits on everything it could fill. Where a piece of this
cannot be had the program is not run.

`passed` means that the last line of the program was reached in the process that began it: it then writes a
random token to a private pipe. An exit with status 0 before that, of whatever kind, is no pass. What no check
in one process can rule out: a program that searches the interpreter's own frames for the token, and an answer
whose `__eq__` says yes to every comparison of the tests.

Memory and processor time are limited for each process, so that a program may have `processes` times as much;
the clock limits all of them together.
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
    "Code of a model runs in Linux namespaces only (kernel 5.14 or newer). Allow them to this user: sysctl "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0; in a container, a "
    "seccomp profile that lets it unshare and mount. Or leave out the suites that run code"
)
_TAIL = 4096  # bytes kept of what the program printed
_SETUP_SECONDS = 60  # what building the jail may take on a busy machine


class Limits(Config):
    """What a program may use."""

    cpu_seconds: int = Field(5, ge=1)
    """Processor time of each process."""
    wall_seconds: float = Field(10.0, gt=0)
    """From the start of the interpreter to the end of all its processes."""
    memory_mb: int = Field(512, ge=64)
    """Address space of each process."""
    processes: int = Field(8, ge=1)
    """Processes and threads at once, the first included."""
    file_mb: int = Field(8, ge=1)
    """All files together, and each one; they lie in memory."""
    open_files: int = Field(32, ge=16)
    output_kb: int = Field(4096, ge=1)
    """Printed to stdout and stderr together; a program that prints more is ended."""


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Args:
        outcome: `passed`: it reached its last line; `failed`: it raised or left before; `timeout`: it was
            ended for its time, on the clock or on the processor; `output`: for what it printed; `killed`: by
            another signal.
        status: exit status, negative for a signal; None where the sandbox ended it.
        tail: the last characters of what it printed, stdout and stderr in one.
    """

    outcome: Outcome
    status: int | None
    tail: str
    seconds: float


def run_python(code: str, limits: Limits = Limits()) -> Ran:  # noqa: B008  (frozen)
    """Run one program in a sandbox of its own; nothing of it is left when this returns. Safe in threads.

    Raises:
        StageFailed: this machine gives no sandbox; the program has not run.
    """
    check_sandbox()
    return _run(code, limits)


def run_many(
    programs: Sequence[str],
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    threads: int | None = None,
) -> list[Ran]:
    """`run_python` of each program, in order, some at once.

    Args:
        threads: sandboxes at once; None: twice as many as there are processors, for part of a run is
            waiting for the kernel to take the namespaces down.
    """
    check_sandbox()
    with ThreadPoolExecutor(threads or 2 * len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda code: _run(code, limits), programs))


@cache
def check_sandbox() -> None:
    """See once that a program runs, and that it runs shut in.

    Raises:
        StageFailed: one of the two is not so.
    """
    if not sys.platform.startswith("linux"):
        raise StageFailed(f"there is no sandbox for model-written code on {sys.platform}", REMEDY)
    ran = _run(_PROBE, Limits(wall_seconds=30.0, processes=3))
    if ran.outcome != "passed":
        reason = ran.tail.strip()[-300:] or f"its trial ended with {ran.outcome}"
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
    raise AssertionError("a socket can be made")
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


def _run(code: str, limits: Limits) -> Ran:
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
            process.terminate()  # it ends when its whole namespace has ended
            process.wait()
        # Nobody holds the other end now, so that this does not wait.
        return watch.judged(written.read(len(token) + 1) == token.encode())


def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def _job(code: str, token: str, limits: Limits) -> bytes:
    megabyte = 2**20
    most = {
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
        # SIGXCPU first, which says why it ended; SIGKILL for a program that ignores it.
        "rlimits": {"RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1)}
        | {name: (value, value) for name, value in most.items()},
        "longest": limits.wall_seconds + 2 * _SETUP_SECONDS,
        # The order of a set is the same in every run; libraries of an interpreter that was built elsewhere.
        "environment": {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": "/python/lib"},
    }
    return marshal.dumps(job)


def _binds() -> dict[str, str]:
    """What the program sees, by the path inside: interpreter, standard library, system libraries."""
    wanted = {f"/python/{lib}": f"{sys.base_prefix}/{lib}" for lib in ("lib", "lib64")}
    alike = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
    wanted |= {path: path for path in (*alike, "/dev/null", "/dev/zero", "/dev/urandom")}
    found = {inside: os.path.realpath(path) for inside, path in wanted.items() if os.path.exists(path)}
    return found | {"/python/bin/python": _python()}


class _Watch:
    """Reads what the launcher reports and what the program prints, and says when it has had enough."""

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
        # A launcher that is gone reports why.
        with suppress(BrokenPipeError), self.process.stdin as stdin:
            rest = memoryview(job)
            while rest:
                rest = rest[stdin.write(rest) :]

    def until_end(self) -> None:
        """Returns when everything has ended by itself, or with `stopped` set when it should be ended."""
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

    def judged(self, reached: bool) -> Ran:
        """The verdict, after all is over.

        Args:
            reached: whether the program's token arrived, and nothing else.
        """
        said = dict(line.partition(" ")[::2] for line in self.report.decode(errors="replace").splitlines())
        tail = self.tail.decode(errors="replace")
        if "error" in said or self.started is None:
            reason = said.get("error") or tail[-300:] or f"it was not built within {_SETUP_SECONDS} s"
            raise StageFailed(f"the sandbox for model-written code cannot be had here: {reason}", REMEDY)
        if self.stopped is not None:
            return Ran(self.stopped, None, tail, self.seconds)
        status = int(said["status"]) if "status" in said else None
        outcome: Outcome = "failed"
        if status == 0 and reached:
            outcome = "passed"
        elif status is None or status < 0:
            outcome = "timeout" if status == -signal.SIGXCPU else "killed"
        return Ran(outcome, status, tail, self.seconds)
