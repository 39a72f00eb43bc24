"""Programs that try to escape, break or cheat the sandbox; each one is really run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dpo_core.errors import StageFailed
from dpo_core.evaluation.call_filter import call_filter
from dpo_core.evaluation.sandbox import Limits, ProgramResult, run_many, run_python
from tests.support.sandboxes import CHECKOUT, OrdinaryUser, is_program, namespaces, watched, why_no_sandbox

Sandbox = Callable[[str, Limits], ProgramResult]
SHORT = Limits(cpu_seconds=2, wall_seconds=60.0, memory_mb=256, processes=6, file_mb=2, output_kb=256)

BRIEF = SHORT.model_copy(update={"wall_seconds": 0.8})


@pytest.fixture(scope="module", autouse=True)
def _needs_sandbox() -> None:
    if reason := why_no_sandbox():
        pytest.skip(reason)


@pytest.fixture(scope="module", params=["this user", "ordinary user"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """As whoever runs the tests, and where that is root as an ordinary user too."""
    if request.param == "this user":
        yield run_python
        return
    if os.geteuid() != 0:
        pytest.skip("this user is the ordinary user")
    try:
        user = OrdinaryUser()
    except OSError as error:
        pytest.skip(str(error))
    yield user
    user.close()


def passes(sandbox: Sandbox, code: str, limits: Limits = SHORT) -> ProgramResult:
    ran = sandbox(code, limits)
    assert ran.outcome == "passed", ran
    return ran


def test_a_program_passes_by_reaching_its_end(sandbox: Sandbox) -> None:
    ran = passes(sandbox, "import math\nassert math.isqrt(50) == 7")
    assert ran.status == 0
    assert ran.tail == ""


def test_a_failed_assertion_and_a_syntax_error_are_shown() -> None:
    ran = run_python("print('so far')\nassert 1 == 2, 'not equal'", SHORT)
    assert (ran.outcome, ran.status) == ("failed", 1)
    assert ran.tail.startswith("so far\n")
    assert ran.tail.endswith('"program.py", line 2, in <module>\nAssertionError: not equal\n')
    assert "SyntaxError" in run_python("def f(:", SHORT).tail


def test_text_that_is_no_utf8_and_source_longer_than_a_pipe(sandbox: Sandbox) -> None:
    passes(sandbox, "x = '" + "é" * 300_000 + "'\nassert len(x) == 300_000")
    assert sandbox("x = '\ud800'", SHORT).outcome == "failed"


# --- resources --------------------------------------------------------------------------------------------


def test_fork_bomb_stays_small_and_is_gone_at_the_end(sandbox: Sandbox) -> None:
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    pid = sandbox.process.pid if isinstance(sandbox, OrdinaryUser) else None
    with watched(pid) as seen:
        ran = sandbox(bomb, BRIEF)
    assert ran.outcome == "timeout"
    assert 2 <= seen.most <= SHORT.processes
    assert not seen.left()


def test_processes_and_threads_are_counted_together(sandbox: Sandbox) -> None:
    ran = sandbox(
        """
import os, sys, threading, time
threads = 0
for kind in range(2):
    while True:
        try:
            if kind == 0 and threads == 2:
                break
            if kind == 0:
                threading.Thread(target=time.sleep, args=(9,)).start()
            elif os.fork() == 0:
                time.sleep(9)
            threads += 1
        except (RuntimeError, BlockingIOError):
            break
print(threads, file=sys.stderr, flush=True)
""",
        SHORT,
    )
    assert (ran.outcome, ran.tail) == ("passed", f"{SHORT.processes - 1}\n")


def test_endless_loop_ends_by_processor_time() -> None:
    ran = run_python("while True: pass", Limits(cpu_seconds=1, wall_seconds=60.0))
    assert (ran.outcome, ran.status) == ("timeout", -signal.SIGXCPU)


def test_sleeping_for_ever_ends_by_the_clock(sandbox: Sandbox) -> None:
    ran = sandbox("import time\ntime.sleep(1e6)", BRIEF)
    assert (ran.outcome, ran.status) == ("timeout", None)
    assert BRIEF.wall_seconds <= ran.seconds < BRIEF.wall_seconds + 60


def test_ignoring_every_signal_does_not_help() -> None:
    deaf = """
import signal
for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        while True: pass
    except BaseException: pass
"""
    with watched() as seen:
        ran = run_python(deaf, BRIEF)
    assert ran.outcome == "timeout"
    assert seen.processes
    assert not seen.left()


@pytest.mark.parametrize(
    "take",
    [
        "x = bytearray(10 * 2**30)",
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "import mmap\nx = mmap.mmap(-1, 10 * 2**30)",
    ],
)
def test_ten_gigabytes_are_refused(take: str) -> None:
    with watched() as seen:
        ran = run_python(take, SHORT)
    assert ran.outcome == "failed"
    assert "MemoryError" in ran.tail or "Cannot allocate memory" in ran.tail
    assert seen.most_bytes < SHORT.memory_mb * 2**20


def test_memory_outside_of_processes_is_refused(sandbox: Sandbox) -> None:
    passes(
        sandbox,
        """
import ctypes, os
try:
    os.memfd_create("x")
except PermissionError: pass
else: raise AssertionError("memfd")
libc = ctypes.CDLL(None, use_errno=True)
assert libc.shmget(0, 2**20, 0o1600) == -1, "shared memory"
""",
    )


def test_printing_for_ever_is_cut_off() -> None:
    for stream in (1, 2):
        ran = run_python(f"import os\nwhile True: os.write({stream}, b'x' * 60000)", SHORT)
        assert (ran.outcome, ran.status) == ("output", None)
        assert ran.tail == "x" * 4096
        assert ran.seconds < SHORT.wall_seconds


def test_huge_and_many_files_are_refused(sandbox: Sandbox) -> None:
    passes(
        sandbox,
        """
import errno, os
def fill(name):
    with open(name, "wb", buffering=0) as file:
        for _ in range(100):
            file.write(bytes(2**20))
for name, code in (("/tmp/one", errno.EFBIG), ("/tmp/two", errno.ENOSPC)):
    try:
        fill(name)
    except OSError as error:
        assert error.errno in (code, errno.ENOSPC), error
    else: raise AssertionError(name)
assert sum(os.path.getsize(f) for f in os.listdir(".")) <= 2 * 2**20
try:
    held = [open("/dev/null") for _ in range(100)]
except OSError as error: assert error.errno == errno.EMFILE, error
else: raise AssertionError("open files without end")
""",
    )


@pytest.mark.parametrize("make", ["open(str(i), 'w').close()", "os.mkdir(str(i))", "os.symlink('/', str(i))"])
def test_a_program_may_make_a_thousand_files_and_no_more(sandbox: Sandbox, make: str) -> None:
    program = f"import os, time\nfor i in range({{}}): {make}\ntime.sleep(0.3)"
    passes(sandbox, program.format(1000))
    ran = sandbox(program.format(1100), SHORT)
    assert (ran.outcome, ran.status) == ("files", None)


# --- what it can reach ------------------------------------------------------------------------------------


def test_every_namespace_is_its_own(sandbox: Sandbox) -> None:
    ordinary = isinstance(sandbox, OrdinaryUser)
    with watched(sandbox.process.pid if isinstance(sandbox, OrdinaryUser) else None) as seen:
        sandbox("import time\ntime.sleep(0.3)", SHORT)
    mine = namespaces("self")
    inside = next(found for found in seen.namespaces if found)
    # Root needs no user namespace to make the others.
    shared = [] if ordinary or os.geteuid() != 0 else ["user"]
    assert [name for name in mine if mine[name] == inside[name]] == shared


def test_deleting_everything_deletes_nothing_outside(sandbox: Sandbox, tmp_path: Path) -> None:
    canaries = [tmp_path / "canary", CHECKOUT / "dpo_core" / "errors.py", Path("/etc/passwd")]
    canaries[0].write_text("alive")
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o777)  # nothing but the sandbox is in the way
    before = [canary.read_bytes() for canary in canaries]
    passes(
        sandbox,
        f"""
import os, shutil
gone = {[str(canary) for canary in canaries]}
assert not any(map(os.path.exists, gone)), "outside is visible"
own = [os.path.dirname(os.__file__), "/python/bin", "/etc", "/dev", "/lib/os-release"]
for path in [*gone, {str(CHECKOUT)!r}, {str(Path.home())!r}, *own]:
    shutil.rmtree(path, ignore_errors=True)
    try: os.unlink(path)
    except OSError: pass
    try: open(path, "w").write("gone")
    except OSError: pass
import wave  # the standard library is still there
try: open("/python/lib/new", "w")
except OSError: pass
else: raise AssertionError("the library can be written")
for path in ("/", "/python/lib", "/python/bin/python", "/lib", "/usr/lib", "/etc"):
    assert os.statvfs(path).f_flag & os.ST_RDONLY, path
""",
    )
    assert [canary.read_bytes() for canary in canaries] == before
    assert Path(os.__file__).exists()


def test_no_secret_is_in_reach(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_REWARD_TOKEN", "planted-secret")
    secret = Path.home() / ".dpo-sandbox-canary"
    secret.write_text("planted-secret")
    try:
        passes(
            sandbox,
            f"""
import os
assert set(os.environ) <= {{"PYTHONHASHSEED", "LD_LIBRARY_PATH", "LC_CTYPE", "PWD"}}, os.environ
for path in ({str(secret)!r}, "/proc", "/sys", "/etc/passwd", "/etc/shadow", 
             "/root", "/home", "/usr/bin", "/var"):
    assert not os.path.exists(path), path
assert os.listdir("/etc") in ([], ["ld.so.cache"]), os.listdir("/etc")
assert not os.path.exists(os.path.expanduser("~"))
assert open(0, closefd=False).read() == ""
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
assert sum(map(is_open, range(3, 1024))) == 1, "more than the pipe of the result"
""",
        )
    finally:
        secret.unlink()


def test_no_socket_reaches_anything(sandbox: Sandbox, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        unix.bind(str(tmp_path / "socket"))
        abstract.bind(f"\0dpo-{os.getpid()}")
        for listener in (unix, abstract):
            listener.listen()
        socket.create_connection(tcp.getsockname()).close()  # there is something to reach
        tcp.accept()[0].close()
        passes(
            sandbox,
            f"""
import socket
def refused(what, *arguments):
    try: what(*arguments)
    except OSError: return
    raise AssertionError((what, arguments))
refused(socket.create_connection, {tcp.getsockname()!r})
refused(socket.getaddrinfo, "example.com", 80)
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_VSOCK):
    refused(socket.socket, family)
refused(lambda: socket.socket(socket.AF_UNIX).connect({str(tmp_path / "socket")!r}))
refused(lambda: socket.socket(socket.AF_UNIX).connect({abstract.getsockname()!r}))
a, b = socket.socketpair()  # reaches nobody
""",
        )
        tcp.setblocking(False)
        with pytest.raises(BlockingIOError):
            tcp.accept()


def test_no_privilege_can_be_had(sandbox: Sandbox) -> None:
    passes(
        sandbox,
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, *arguments):
    assert getattr(libc, name)(*arguments) == -1, name
for flag in (0x10000000, 0x00020000, 0x40000000):
    refused("unshare", flag)
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
# Not in the filter: the changed root forbids it.
refused("syscall", clone, 0x10000000 | 17, 0, 0, 0, 0)
refused("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, None)
refused("chroot", b"/tmp")
for change in (os.setuid, os.setgid):
    try: change(0)
    except OSError: pass
    else: raise AssertionError(change)
import resource
try: resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))
except ValueError: pass
else: raise AssertionError("limits can be raised")
for name, most in {"FSIZE": 2 * 2**20, "AS": 256 * 2**20, "NOFILE": 32, "CORE": 0, "MSGQUEUE": 0}.items():
    assert resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) == (most, most), name
assert libc.prctl(39, 0, 0, 0, 0) == 1, "no_new_privs"
held = (ctypes.c_uint * 6)()
assert libc.capget((ctypes.c_uint * 2)(0x20080522, 0), held) == 0
assert held[0] == held[1] == held[3] == held[4] == 0, "effective and permitted capabilities"
""",
    )


def test_its_parent_cannot_be_killed_or_traced(sandbox: Sandbox) -> None:
    passes(
        sandbox,
        """
import ctypes, os, signal, time
assert os.getppid() == 1
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
for number in range(1, 32):
    for target in (1, -1):
        try: os.kill(target, number)
        except OSError: pass
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ptrace(16, 1, 0, 0) == -1
assert libc.syscall(438, -1, 0, 0) == -1 and ctypes.get_errno() == 1, "pidfd_getfd"
time.sleep(0.1)
assert os.getppid() == 1
""",
    )


def test_a_daemon_does_not_survive(sandbox: Sandbox) -> None:
    daemon = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        while True: time.sleep(1)
    os._exit(0)
time.sleep(0.2)
"""
    pid = sandbox.process.pid if isinstance(sandbox, OrdinaryUser) else None
    with watched(pid) as seen:
        ran = passes(sandbox, daemon)
    assert ran.seconds < SHORT.wall_seconds
    assert seen.most >= 2
    assert not seen.left()


# --- forging a pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leave",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os.execv('/python/bin/python', ['python', '-S', '-c', ''])",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
        "import os, sys; os._exit = os.write = sys.excepthook = lambda *a: 0; sys.exit(0)",
        "import os\nif os.fork(): os._exit(0)\n",
        "import os\nif os.fork(): os.wait(); os._exit(0)\n",
        "import os\nif os.fork() == 0: raise SystemExit\nos._exit(0)",
        "import os\nfor fd in range(3, 4096):\n try: os.write(fd, b'passed' * 9)\n except OSError: pass\n",
        "import threading, os; threading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
        "import sys; sys.settrace(lambda *a: sys.exit(0))\ndef f(): pass\nf()",
    ],
)
def test_leaving_early_is_no_pass(leave: str) -> None:
    ran = run_python(f"{leave}\nimport time; time.sleep(0.1)", SHORT)
    assert ran.outcome in ("failed", "killed"), ran


# --- the machine around it --------------------------------------------------------------------------------


def test_many_run_at_once_in_order() -> None:
    programs = [f"assert {i} % 3" for i in range(12)]
    ran = run_many(programs, SHORT, threads=4)
    assert [r.outcome for r in ran] == ["failed" if i % 3 == 0 else "passed" for i in range(12)]


def test_sets_have_one_order() -> None:
    show = "import sys; print({'a', 'b', 'c', 'd', 'e'}, file=sys.stderr, flush=True)"
    assert run_python(show, SHORT).tail == run_python(show, SHORT).tail != ""


CALLER = """
from dpo_core.evaluation.sandbox import Limits, check_sandbox, run_python
check_sandbox()
print("checked", flush=True)
run_python("while True: pass", Limits(cpu_seconds=60, wall_seconds=60))
"""


def test_nothing_outlives_a_caller_that_is_killed() -> None:
    environment = {"PYTHONPATH": str(CHECKOUT)}
    below: list[psutil.Process] = []
    with subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, env=environment) as caller:
        try:
            assert caller.stdout
            assert caller.stdout.readline() == b"checked\n"
            deadline = time.monotonic() + 120
            while not any(map(is_program, below)) and time.monotonic() < deadline:
                below = psutil.Process(caller.pid).children(recursive=True)
            assert any(map(is_program, below))
        finally:
            caller.kill()
    _, alive = psutil.wait_procs(below, timeout=5)
    assert not alive


REFUSED = """
from dpo_core.errors import StageFailed
from dpo_core.evaluation.sandbox import run_python
try:
    run_python("pass")
except StageFailed as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("command", "reason", "remedy"),
    [
        (["env", "PATH=/nowhere"], "needs bubblewrap", "apt-get install bubblewrap"),
        (["setpriv", "--bounding-set=-all"], "bwrap: Creating new namespace failed", "sysctl"),
        # Root with no id but its own, which the kernel's limit on processes does not bind.
        (["unshare", "--user", "--map-root-user"], "Operation not permitted", "sysctl"),
    ],
)
def test_a_machine_that_gives_no_sandbox_is_refused(command: list[str], reason: str, remedy: str) -> None:
    if os.geteuid() != 0 and command[0] != "env":
        pytest.skip("needs root, who can take rights away from itself")
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    ran = subprocess.run(
        [*command, sys.executable, "-c", REFUSED],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert reason in ran.stdout
    assert remedy in ran.stdout


def test_a_filter_that_lacks_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_core.evaluation.call_filter._REFUSED", ("socket", "no_such_call"))
    with pytest.raises(StageFailed, match="it does not know no_such_call"):
        call_filter.__wrapped__()


def test_a_narrow_umask_does_not_shut_the_program_out() -> None:
    before = os.umask(0o077)
    try:
        passes(run_python, "open('/tmp/x', 'w').close()")
    finally:
        os.umask(before)
