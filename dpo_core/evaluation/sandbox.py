"""Runs Python code that a model wrote, in a bubblewrap sandbox without network and with limited resources.

The program sees the interpreter with its standard library and the system's libraries, read-only, and an empty
folder in memory. It has all namespaces of its own, no capability, no environment but `PYTHONHASHSEED`, and a
limit on every resource. If any part cannot be set up, it is not run.

`passed` means that the process that started the program reached its last line: it then writes a random token
to a private pipe. Any earlier exit with status 0 does not pass. A check within one process cannot rule out
a program that searches the interpreter's frames for the token, or an answer whose `__eq__` is always true.

Memory and processor time are limited per process, so that a program may use `processes` times as much; the
wall time is limited for all of them together.
"""

import marshal
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO, Literal

import psutil
from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.evaluation.call_filter import INSTALL, call_filter

Outcome = Literal["passed", "failed", "timeout", "output", "files", "killed"]
REMEDY = (
    "Code of a model runs in Linux namespaces only (kernel 5.14 or newer). Allow them for this user: sysctl "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0; in a container, a "
    "seccomp profile that permits unshare and mount. Or remove the suites that run code"
)
_TAIL = 4096  # last bytes of the output that are kept
# Files, folders and links at once, which a tmpfs of bwrap does not limit: each takes 1 KiB of the kernel.
_MOST_FILES = 1024
_SETUP_SECONDS = 60  # time to set up the sandbox on a busy machine
_READY = b"ready\n"
# First in the sandbox to be killed if memory runs out; the shell has nothing else to do.
_START = 'echo 1000 > /proc/self/oom_score_adj; exec "$@"'

# Process 1 of the sandbox, whose end ends all others, starts the program and waits for it; nothing inside can
# kill it. Everything needed at the end is bound before, so that replacing os.write or sys.excepthook has no
# effect. The program is not __main__, as in HumanEval's original harness.
_RUNNER = """
def run():
    import _signal, marshal, os, resource, sys
    fd, getpid, write, leave, show = int(sys.argv[1]), os.getpid, os.write, os._exit, sys.__excepthook__
    with open(0, "rb", closefd=False) as file:
        job = marshal.load(file)
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    program = os.fork()
    if program:
        os.close(fd)
        ended = status = 0
        while ended != program:
            ended, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        leave(128 - code if code < 0 else code)
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    os.close(0)
    os.open("/dev/null", os.O_RDONLY)  # becomes 0, the lowest that is free
    for kind, limits in job["limits"].items():
        resource.setrlimit(kind, limits)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    me, token, source = getpid(), job["token"], job["source"]
    sys.argv[:] = ["program.py"]
    module = sys.modules["program"] = type(sys)("program")
    write(fd, b"ready\\n")
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException:
        try:
            sys.stdout.flush()
            show(*sys.exc_info())
            sys.stderr.flush()
        finally:
            leave(1)
    if getpid() == me:
        write(fd, token)
    leave(0)
run()
"""


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
            exceeded its wall or processor time; `output`: it printed too much; `files`: it made too many;
            `killed`: another signal.
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
    result = _run(_PROBE, Limits(wall_seconds=30.0, processes=3))
    if result.outcome != "passed":
        reason = result.tail.strip()[-300:] or f"its check ended with {result.outcome}"
        raise StageFailed(f"the sandbox for model-written code does not work here: {reason}", REMEDY)


_PROBE = """
import os, time, _socket
assert os.getuid() == os.geteuid() != 0, "the program is not an unprivileged user"
assert set(os.listdir("/")) <= {"dev", "etc", "lib", "lib64", "python", "tmp", "usr"}, os.listdir("/")
assert set(os.environ) <= {"PYTHONHASHSEED", "LD_LIBRARY_PATH", "LC_CTYPE", "PWD"}, "it has an environment"
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
    token = secrets.token_bytes(16)
    result, program_end = os.pipe()
    with open(result, "rb", buffering=0) as written, open(program_end, "wb", buffering=0) as end:
        with tempfile.TemporaryFile() as filters, tempfile.TemporaryFile() as job:
            filters.write(call_filter())
            filters.seek(0)
            job.write(_job(code, token, limits))
            job.seek(0)
            command = _command(limits, filters.fileno(), end.fileno())
            process = subprocess.Popen(
                ["/bin/sh", "-c", _START, "sh", *command],
                stdin=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
                pass_fds=[filters.fileno(), end.fileno()], env={}, cwd="/", start_new_session=True,
            )  # fmt: skip
        end.close()
        with process:
            return _watch(process, written, token, limits)


def _watch(
    process: subprocess.Popen[bytes], written: BinaryIO, token: bytes, limits: Limits
) -> ProgramResult:
    """Apply the limits on time and output until all processes have ended."""
    assert process.stdout is not None
    stopped: list[Outcome] = []

    def end() -> None:
        # Process 1 of the sandbox first, so that bwrap reaps it.
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children() or [process]:
                each.kill()

    def stop(why: Outcome) -> None:
        stopped.append(why)
        end()

    tail, printed = b"", 0
    timer = threading.Timer(_SETUP_SECONDS, stop, ["timeout"])
    timer.start()
    with ExitStack() as limited:
        try:
            ready = written.read(len(_READY)) == _READY
            started = time.monotonic()
            if ready:
                timer.cancel()
                timer = threading.Timer(limits.wall_seconds, stop, ["timeout"])
                timer.start()
                limited.enter_context(_few_files(process, stop))
            while part := process.stdout.read(65536):
                tail = (tail + part)[-_TAIL:]
                printed += len(part)
                if printed > limits.output_kb * 1024 and not stopped:
                    stop("output")
            status = process.wait()
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
    text = tail.decode(errors="replace")
    if not ready:
        reason = text.strip()[-300:] or f"it was not set up within {_SETUP_SECONDS} s"
        raise StageFailed(f"the sandbox for model-written code cannot be set up here: {reason}", REMEDY)
    seconds = time.monotonic() - started
    if stopped:
        return ProgramResult(stopped[0], None, text, seconds)
    # Status 128 plus its number is how bwrap reports a signal.
    status = 128 - status if status > 128 else status
    outcome: Outcome = "failed"
    if status == 0 and written.read(len(token) + 1) == token:
        outcome = "passed"
    elif status < 0:
        outcome = "timeout" if status == -signal.SIGXCPU else "killed"
    return ProgramResult(outcome, status, text, seconds)


@contextmanager
def _few_files(process: subprocess.Popen[bytes], stop: Callable[[Outcome], None]) -> Iterator[None]:
    """Stop the program when it has too many files.

    Raises:
        StageFailed: its folder cannot be seen from outside.
    """
    try:
        (first,) = psutil.Process(process.pid).children()
        folder = os.open(f"/proc/{first.pid}/root/tmp", os.O_PATH)
    except (ValueError, psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        yield  # the program has ended
        return
    except OSError as error:
        raise StageFailed(f"the sandbox's folder cannot be watched: {error.strerror}", REMEDY) from error
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(0.05):
            space = os.fstatvfs(folder)
            if space.f_files - space.f_ffree > _MOST_FILES:
                stop("files")
                break

    counter = threading.Thread(target=count)
    counter.start()
    try:
        yield
    finally:
        ended.set()
        counter.join()
        os.close(folder)


def _command(limits: Limits, filters: int, result: int) -> list[str]:
    """The command line of the sandbox.

    Raises:
        StageFailed: bubblewrap is not installed.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise StageFailed("the sandbox for model-written code needs bubblewrap (bwrap)", INSTALL)
    if os.geteuid() == 0:
        # The limit on processes never binds root, not even in a user namespace: the runner changes its user.
        user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        user = ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    paths = {f"/python/{lib}": f"{sys.base_prefix}/{lib}" for lib in ("lib", "lib64")}
    paths |= {path: path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")}
    # The interpreter itself, not a virtual environment's link to it.
    paths["/python/bin/python"] = getattr(sys, "_base_executable", "") or sys.executable
    # Folders that --ro-bind itself creates are closed to the program.
    binds = ["--dir", "/python", "--dir", "/python/bin", "--dir", "/usr", "--dir", "/etc", "--dir", "/dev"]
    for inside, outside in paths.items():
        if os.path.exists(outside):
            binds += ["--ro-bind", os.path.realpath(outside), inside]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        binds += ["--dev-bind", device, device]
    return [
        bwrap, *user, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup",
        "--as-pid-1", "--die-with-parent", "--new-session", "--seccomp", str(filters), *binds,
        "--size", str(limits.file_mb * 2**20), "--perms", "1777", "--tmpfs", "/tmp", "--remount-ro", "/",
        "--chdir", "/tmp", "--clearenv",
        # A fixed order of sets; libraries of an interpreter that was built elsewhere.
        "--setenv", "PYTHONHASHSEED", "0", "--setenv", "LD_LIBRARY_PATH", "/python/lib",
        # -I would ignore PYTHONHASHSEED.
        "/python/bin/python", "-P", "-s", "-S", "-c", _RUNNER, str(result),
    ]  # fmt: skip


def _job(code: str, token: bytes, limits: Limits) -> bytes:
    """What the runner reads: the program, its token, its limits and for root the user to become."""
    size = limits.file_mb * 2**20
    # For an ordinary user process 1 counts too.
    processes = limits.processes + (os.geteuid() != 0)
    ceilings = {
        resource.RLIMIT_AS: limits.memory_mb * 2**20,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_NPROC: processes,
        # SIGXCPU first, which shows the reason; SIGKILL for a program that ignores it.
        resource.RLIMIT_CPU: limits.cpu_seconds + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    pairs = {}
    for kind, ceiling in ceilings.items():
        now = resource.getrlimit(kind)[1]
        hard = ceiling if now == resource.RLIM_INFINITY else min(ceiling, now)
        pairs[kind] = (min(hard, limits.cpu_seconds) if kind == resource.RLIMIT_CPU else hard, hard)
    source = code.encode("utf-8", "surrogatepass")
    return marshal.dumps({"source": source, "token": token, "limits": pairs, "user": _unused_id()})


def _unused_id() -> int:
    """A random user id in the upper half of those that this machine or container has."""
    with open("/proc/self/uid_map") as table:
        first, _, count = max((list(map(int, line.split())) for line in table), key=lambda ids: ids[2])
    return first + count // 2 + secrets.randbelow(max(1, count // 2 - 1))
