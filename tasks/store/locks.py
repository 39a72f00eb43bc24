"""Locks between processes of one workspace, whose holders say who they are."""

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
    """Hold a lock. A killed holder lets go by itself. Do not take the same lock twice in one thread.

    Args:
        path: the lock's file; its name and place are made.
        what: what is done, for the error of a disk that fails ("locking the store").
        busy: told who holds the lock when patience is over; raises, or gives the seconds to wait on.
        patience: seconds to wait before that.
        poll: seconds between two looks.

    Raises:
        StageFailed: the disk is full or may not be written.
    """
    holder, lock = path.with_suffix(".holder"), FileLock(path, poll_interval=poll)
    with disk_errors(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                patience = busy(holder_of(path))
        with suppress(OSError):  # only a courtesy to those who wait
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {started}")
    try:
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def holder_of(path: Path) -> str:
    """Who holds a lock. The holder writes its name just after it took it: a moment is given for that."""
    for _ in range(10):
        with suppress(OSError):
            if who := path.with_suffix(".holder").read_text():
                return who
        time.sleep(0.05)
    return "another process"
