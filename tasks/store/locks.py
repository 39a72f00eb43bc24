"""File locks between processes; each lock names its holder, for the message of whoever waits."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.store.files import disk_errors


@contextmanager
def locked(
    path: Path, what: str, busy: Callable[[str], float], patience: float = 0.0, poll: float = 0.05
) -> Iterator[None]:
    """Hold a lock. It is released if the process dies. A thread must not take the same lock twice.

    Args:
        path: the lock's file; created with its folder.
        what: the action in disk error messages ("locking the store").
        busy: called with the holder's name when `patience` is over; raises, or returns the seconds to go on
            waiting.
        patience: seconds to wait before the first call of `busy`.
        poll: seconds between two attempts.

    Raises:
        StageFailed: the disk is full or not writable.
    """
    holder, lock = path.with_suffix(".holder"), FileLock(path, poll_interval=poll)
    with disk_errors(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                patience = busy(holder_of(path))
        with suppress(OSError):  # only informs those who wait
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {started}")
    try:
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of this file."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # nobody can work in a folder that is not writable
        return False
    lock.release()
    return False


def holder_of(path: Path) -> str:
    """The holder of a lock, in words. Waits up to half a second for its name, written after locking."""
    for _ in range(10):
        with suppress(OSError):
            if who := path.with_suffix(".holder").read_text():
                return who
        time.sleep(0.05)
    return "another process"
