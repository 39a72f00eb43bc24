"""Isolates a program that a model wrote, by Linux namespaces and seccomp; a script that `run` starts.

There are three processes. The parent stays outside and waits. The init process is process 1 of a new PID
namespace: it sets up the sandbox and has all privileges inside. The program is its child and has none. When
the init process exits, the kernel kills everything in its namespace before the parent is notified.

Only the standard library is imported: the script runs in the bare interpreter, without site-packages. The
numbers are those of the kernel's headers; Linux 5.14 is the oldest that counts processes by namespace.
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import resource
import signal
import struct
import sys
import time

TYPE_CHECKING = False  # importing typing would take a tenth of the time of a run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

CLONE_NEWUSER = 0x1000_0000
# Mounts, cgroup view, host name, IPC, processes, network.
NAMESPACES = 0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x2000_0000 | 0x4000_0000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x4_0000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_READ_ONLY, ATTR_NOSUID, ATTR_NODEV = 0x1, 0x2, 0x4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
# The same numbers on both architectures.
SYS_IO_URING_SETUP, SYS_MOUNT_SETATTR = 425, 442

INSIDE_ID = 1000  # user and group of the program inside the sandbox

# System calls refused to the program, by architecture: (audit architecture, numbers). Each either evades a
# limit (memory that belongs to no process) or exposes kernel code that plain Python never uses. `socket` is
# included although the network namespace is empty: AF_VSOCK reaches a virtual machine's host in spite of it.
REFUSED = {
    "x86_64": (0xC000_003E, {
        "socket": 41, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319,
        "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "unshare": 272, "setns": 308, "mount": 165,
        "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "io_uring_setup": SYS_IO_URING_SETUP,
    }),
    "aarch64": (0xC000_00B7, {
        "socket": 198, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279,
        "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "unshare": 97, "setns": 268, "mount": 40,
        "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "io_uring_setup": SYS_IO_URING_SETUP,
    }),
}  # fmt: skip

# Runs the program in the new interpreter. Everything needed afterwards is bound before, so that replacing
# os.write or sys.excepthook has no effect. The program is not __main__, as in HumanEval's original harness.
# The token proves that the last line was reached, whatever the exit status.
RUNNER = """
def run():
    import os, sys
    fd, me = int(sys.argv[1]), os.getpid()
    getpid, write, leave, show = os.getpid, os.write, os._exit, sys.__excepthook__
    with open(0, "rb", closefd=False) as job:
        token, source = job.read().split(b"\\n", 1)
    os.close(0)
    os.open("/dev/null", os.O_RDONLY)  # becomes 0, the lowest that is free
    sys.argv[:] = ["program.py"]
    program = sys.modules["program"] = type(sys)("program")
    try:
        exec(compile(source, "program.py", "exec"), program.__dict__)
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

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


class SetupError(Exception):
    """A step of the setup failed; the program did not run."""


def call(what: str, function: Callable[..., int], *arguments: Any) -> int:
    """Call the C library; raise SetupError with the step's name on -1."""
    result = function(*arguments)
    if result == -1:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def control(what: str, option: int, value: int, pointer: int = 0) -> None:
    call(what, libc.prctl, option, value, pointer, 0, 0)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def main() -> None:
    job = marshal.loads(sys.stdin.buffer.read())  # written by the same interpreter, and faster than JSON
    try:
        launch(job, result_fd=int(sys.argv[1]))
    except (SetupError, OSError) as error:
        report("error", str(error))
        os._exit(1)


def report(kind: str, text: str = "") -> None:
    """Write one line to the caller."""
    os.write(1, f"{kind} {' '.join(text.split())}\n".encode())


def launch(job: dict[str, Any], result_fd: int) -> None:
    """Enter the namespaces, start the init process and wait for it; SIGTERM kills all of the sandbox."""
    if os.uname().machine not in REFUSED:
        raise SetupError(f"the architecture {os.uname().machine} is not supported")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until there is a process to kill
    write("/proc/self/oom_score_adj", "1000")  # if memory runs out, the sandbox is killed first
    enter_namespaces()
    # After the change of user, which clears it: no process of the sandbox outlives the caller.
    control("die with the caller", PR_SET_PDEATHSIG, signal.SIGKILL)
    init = os.fork()
    if init == 0:
        run_init(job, result_fd)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(init, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.waitpid(init, 0)
    os._exit(0)


def enter_namespaces() -> None:
    """Create all kinds of namespaces, with one mapped id for an ordinary user and two for root.

    Root maps itself, to set up the sandbox, and an unused id for the program, because the kernel's limit on
    processes does not apply to root. Only a process outside may map more than one id.
    """
    me = os.geteuid(), os.getegid()
    unused = [_unused_id("uid"), _unused_id("gid")]
    if me[0] != 0 or 0 in unused:
        call("new namespaces", libc.unshare, CLONE_NEWUSER | NAMESPACES)
        write("/proc/self/setgroups", "deny")
        for kind, outside in zip(("uid", "gid"), me, strict=True):
            write(f"/proc/self/{kind}_map", f"{INSIDE_ID} {outside} 1\n")
        return
    parent = os.getpid()
    entered_read, entered_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(entered_write)
        os.read(entered_read, 1)
        try:
            for kind, outside in zip(("uid", "gid"), unused, strict=True):
                write(f"/proc/{parent}/{kind}_map", f"0 0 1\n{INSIDE_ID} {outside} 1\n")
        except OSError:
            os._exit(1)
        os._exit(0)
    call("new namespaces", libc.unshare, CLONE_NEWUSER | NAMESPACES)
    os.close(entered_write)
    if os.waitpid(helper, 0)[1] != 0:
        raise SetupError("map a second user: root has no CAP_SETUID or CAP_SETGID here")


def _unused_id(kind: str) -> int:
    """An id in the upper half of the mapped ones, different for each sandbox; 0 if only one is mapped."""
    with open(f"/proc/self/{kind}_map") as table:
        ranges = [tuple(map(int, line.split())) for line in table]
    first, _, count = max(ranges, key=lambda mapped: mapped[2])
    half = count // 2
    return first + half + os.getpid() % (half - 1) if half > 1 else 0


def run_init(job: dict[str, Any], result_fd: int) -> NoReturn:
    """Process 1 of the sandbox: sets it up, starts the program, reaps orphans, reports the program's status.

    Signals from inside cannot kill process 1, least of all blocked ones; a process without its capabilities
    can neither trace nor read it.
    """
    try:
        os.umask(0o022)  # the program, another user, needs access to the folders created here
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        control("die with the parent", PR_SET_PDEATHSIG, signal.SIGKILL)
        control("hide memory", PR_SET_DUMPABLE, 0)
        build(job["binds"], job["file_bytes"])
        program = os.fork()
        if program == 0:
            start_program(job, result_fd)
        os.close(result_fd)
        deadline = time.monotonic() + job["longest"]  # in case the caller is suspended and never kills it
        while (left := deadline - time.monotonic()) > 0:
            signal.sigtimedwait([signal.SIGCHLD], left)
            ended = reap(program)
            if ended is not None:
                report("status", str(os.waitstatus_to_exitcode(ended)))
                break
        os._exit(0)
    except (SetupError, OSError) as error:
        report("error", str(error))
        os._exit(1)


def reap(program: int) -> int | None:
    """Reap all ended processes; the program's wait status if it is among them."""
    while True:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == program:
            return status
        if process == 0:
            return None


def build(binds: dict[str, str], file_bytes: int) -> None:
    """Make a root with the interpreter, the system's libraries and a small folder in memory only.

    There is no /proc and no /sys. The program's root is one folder below that of the mount namespace: the
    kernel does not let a process in a chroot create a user namespace and gain privileges in it.

    Args:
        binds: path inside to path outside.
        file_bytes: size of the writable folder.
    """
    mount(None, "/", MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "tmpfs", "mode=755,size=1m")
    os.makedirs("/tmp/outside")
    call("change root", libc.pivot_root, b"/tmp", b"/tmp/outside")
    os.chdir("/")
    for inside, outside in binds.items():
        source, target = "/outside" + outside, "/jail" + inside
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        mount(source, target, MS_BIND | MS_REC)
        no_devices = 0 if inside.startswith("/dev/") else ATTR_NODEV
        restrict(target, ATTR_READ_ONLY | ATTR_NOSUID | no_devices, AT_RECURSIVE)
    os.mkdir("/jail/tmp")
    size = f"mode=1777,size={file_bytes},nr_inodes=1024"
    mount("tmpfs", "/jail/tmp", MS_NOSUID | MS_NODEV, "tmpfs", size)
    call("leave the old root", libc.umount2, b"/outside", MNT_DETACH)
    restrict("/", ATTR_READ_ONLY | ATTR_NOSUID | ATTR_NODEV)
    os.chroot("/jail")
    os.chdir("/tmp")


def mount(source: str | None, target: str, flags: int, kind: str | None = None, options: str = "") -> None:
    call(
        f"mount {source or ''} on {target}", libc.mount,
        source.encode() if source else None, target.encode(), kind.encode() if kind else None,
        ctypes.c_ulong(flags), options.encode() or None,
    )  # fmt: skip


def restrict(target: str, attributes: int, flags: int = 0) -> None:
    """Add attributes to a mount, and with AT_RECURSIVE to all below it (mount_setattr, Linux 5.12)."""
    settings = struct.pack("QQQQ", attributes, 0, 0, 0)
    call(
        f"restrict {target}", libc.syscall,
        SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, settings, ctypes.c_size_t(len(settings)),
    )  # fmt: skip


def start_program(job: dict[str, Any], result_fd: int) -> NoReturn:
    """Become the program: set its limits, drop privileges, close all files but three and the result pipe."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()
        program = os.memfd_create("program")
        os.write(program, f"{job['token']}\n".encode() + job["code"].encode("utf-8", "surrogatepass"))
        os.lseek(program, 0, os.SEEK_SET)
        report_fd = os.dup(1)  # closed by exec
        os.dup2(program, 0)
        os.dup2(2, 1)
        for name, (soft, hard) in job["rlimits"].items():
            limit(getattr(resource, name), soft, hard)
        processes = job["processes"]
        drop_capabilities()
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
            os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
        else:
            processes += 2  # the parent and the init process run as the same user
        limit(resource.RLIMIT_NPROC, processes, processes)
        # Version 3 of the header, this process; effective, permitted and inheritable are all empty.
        call("drop capabilities", libc.capset, struct.pack("Ii", 0x2008_0522, 0), bytes(24))
        control("no new privileges", PR_SET_NO_NEW_PRIVS, 1)
        refuse_calls(*REFUSED[os.uname().machine])
        os.set_inheritable(result_fd, True)
        os.write(report_fd, b"ready\n")
        python = "/python/bin/python"
        options = ["-P", "-s", "-S", "-c", RUNNER, str(result_fd)]  # -I would ignore PYTHONHASHSEED
        os.execve(python, [python, *options], job["environment"])
    except (SetupError, OSError, ValueError) as error:
        os.write(report_fd, f"error {error}\n".encode())
        os._exit(1)


def limit(kind: int, soft: int, hard: int) -> None:
    """Set a limit, at most this process's own hard limit."""
    now = resource.getrlimit(kind)[1]
    ceiling = hard if now == resource.RLIM_INFINITY else min(hard, now)
    resource.setrlimit(kind, (min(soft, ceiling), ceiling))


def drop_capabilities() -> None:
    """Empty the bounding set, so that no later exec restores a capability."""
    last = 0
    while libc.prctl(PR_CAPBSET_DROP, last, 0, 0, 0) == 0:
        last += 1
    if ctypes.get_errno() != errno.EINVAL:  # the kernel has no capability of that number
        raise SetupError(f"drop capability {last}: {os.strerror(ctypes.get_errno())}")


def refuse_calls(architecture: int, refused: dict[str, int]) -> None:
    """Install a filter (seccomp mode 2): kill on another architecture's calls, EPERM on the refused ones."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # instructions of the classic packet filter
    kill, allow, refuse = 0x8000_0000, 0x7FFF_0000, 0x0005_0001
    numbers = sorted(refused.values())
    steps = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x4000_0000),  # the second set of numbers that x86_64 has
        (answer, 0, 0, kill),
        *((equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    filters = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(filters, len(filters))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer)))
    control("filter system calls", PR_SET_SECCOMP, 2, ctypes.addressof(program))


if __name__ == "__main__":
    main()
