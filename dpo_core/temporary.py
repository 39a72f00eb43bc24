"""Unfinished files and folders: named after the process that works on them, so that those of killed ones are
found and removed."""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from dpo_core.config import Config
from dpo_core.system import process_start, remove

_PREFIX = "tmp-"
# A process of another machine cannot be checked; it counts as dead after this time.
_FOREIGN_SECONDS = 24 * 3600.0


class Owner(Config):
    """One process, distinguished from all others that had the same process id."""

    host: str
    """Name of its machine."""
    pid: int
    """Its process id."""
    born: int
    """Its start time (`dpo_core.system.process_start`)."""

    def is_gone(self) -> bool:
        """Whether the process has ended; False for processes of other machines."""
        if self.host != socket.gethostname():
            return False
        try:
            return (
                process_start(self.pid) != self.born
                or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def this_process() -> Owner:
    """This process."""
    return Owner(host=socket.gethostname(), pid=os.getpid(), born=process_start(os.getpid()))


def temporary_in(folder: Path) -> Path:
    """An unused path in a folder, for this process's unfinished work."""
    me = this_process()
    return folder / f"{_PREFIX}{me.host}+{me.pid}+{me.born}+{uuid.uuid4().hex[:8]}"


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final`, renamed to it at the end; an error or a kill leaves no `final`."""
    temporary = temporary_in(final.parent)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if os.path.lexists(final):
            discard(final)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a file or folder. It is renamed first, so that nobody finds an incomplete one."""
    hidden = temporary_in(path.parent)
    with suppress(FileNotFoundError):
        os.rename(path, hidden)
        remove(hidden)


def leftovers(folder: Path) -> list[Path]:
    """The unfinished work of killed processes in a folder."""
    return [path for path in sorted(folder.glob(f"{_PREFIX}*")) if not _has_owner(path)]


def _has_owner(temporary: Path) -> bool:
    try:
        host, pid, born, _ = temporary.name.removeprefix(_PREFIX).rsplit("+", 3)
        owner = Owner(host=host, pid=int(pid), born=int(born))
        if host != socket.gethostname():
            return time.time() - temporary.stat().st_mtime < _FOREIGN_SECONDS
        return not owner.is_gone()
    except (ValueError, FileNotFoundError):
        return False
