"""The filter of system calls that a sandboxed program runs under, as libseccomp compiles it."""

import ctypes
import errno
import struct
import tempfile
from functools import cache

from dpo_core.errors import StageFailed

INSTALL = "Install it: apt-get install bubblewrap libseccomp2. Or remove the suites that run code"

_CLONE_NEWUSER = 0x1000_0000
# System calls refused to the program. Each either evades a limit (memory that belongs to no process) or
# exposes kernel code that plain Python never uses. `socket` is included although the network namespace is
# empty: AF_VSOCK reaches a virtual machine's host in spite of it.
_REFUSED = (
    "socket", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "memfd_create", "shmget",
    "semget", "msgget", "mq_open", "unshare", "setns", "mount", "add_key", "request_key", "keyctl", "bpf",
    "perf_event_open", "userfaultfd", "io_uring_setup",
)  # fmt: skip


@cache
def call_filter() -> bytes:
    """The program of the kernel's filter that fails the refused calls with EPERM, as libseccomp compiles it.

    Raises:
        StageFailed: libseccomp is not installed, or lacks one of the calls.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise StageFailed("the sandbox for model-written code needs libseccomp", INSTALL) from error
    library.seccomp_init.restype = ctypes.c_void_p
    allow, fail = 0x7FFF_0000, 0x0005_0000

    def done(what: str, succeeded: bool) -> None:
        if not succeeded:
            reason = f"libseccomp cannot make the sandbox's filter: {what}"
            raise StageFailed(reason, "Install libseccomp 2.5.0 or newer. Or remove the suites that run code")

    address = library.seccomp_init(ctypes.c_uint32(allow))
    done("seccomp_init failed", bool(address))
    context = ctypes.c_void_p(address)

    def refuse(call: str, error: int, *conditions: bytes) -> None:
        number = library.seccomp_syscall_resolve_name(call.encode())
        done(f"it does not know {call}", number != -1)
        added = library.seccomp_rule_add_array(
            context, ctypes.c_uint32(fail | error), number, len(conditions), b"".join(conditions) or None
        )
        done(f"the rule of {call} was not added", added == 0)

    for name in _REFUSED:
        refuse(name, errno.EPERM)
    # No user namespace, in which it would have privileges: argument 0 of clone, masked (7); the C library
    # falls back to it from clone3, whose arguments a filter cannot read.
    refuse("clone", errno.EPERM, struct.pack("=IIQQ", 0, 7, _CLONE_NEWUSER, _CLONE_NEWUSER))
    refuse("clone3", errno.ENOSYS)
    with tempfile.TemporaryFile() as file:
        done("it was not written", library.seccomp_export_bpf(context, file.fileno()) == 0)
        library.seccomp_release(context)
        file.seek(0)
        return file.read()
