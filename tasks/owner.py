"""Which process does a piece of work, and whether that process still lives."""

import os
import socket

import psutil

from dpo_core.config import Config


class Owner(Config):
    """One process, told from every other that ever had its number."""

    host: str
    """Name of its machine."""
    pid: int
    """Its number there."""
    born: int
    """When it started, in seconds since 1970."""

    def is_here(self) -> bool:
        """Whether it is or was one of this machine; others cannot be asked for."""
        return self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """Whether it has ended. Of another machine's nobody knows: then it is not."""
        if not self.is_here():
            return False
        try:
            process = psutil.Process(self.pid)
            other = abs(process.create_time() - self.born) >= 2
            return other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def myself() -> Owner:
    """This process."""
    return Owner(host=socket.gethostname(), pid=os.getpid(), born=int(psutil.Process().create_time()))
