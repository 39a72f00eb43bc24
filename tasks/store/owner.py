"""Process identity: which process owns a piece of work, and whether it is still alive."""

import os
import socket

import psutil

from dpo_core.config import Config
from dpo_core.system import process_start


class Owner(Config):
    """One process, distinguished from all others that had the same process id."""

    host: str
    """Name of its machine."""
    pid: int
    """Its process id."""
    born: int
    """Its start time (`dpo_core.system.process_start`)."""

    def is_here(self) -> bool:
        """Whether the process ran on this machine. Processes of other machines cannot be checked."""
        return self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """Whether the process has ended; False for processes of other machines."""
        if not self.is_here():
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
