"""Which process does a piece of work, and whether that process still lives."""

import os
import socket

import psutil

from dpo_core.config import Config
from dpo_core.system import birth


class Owner(Config):
    """One process, told from every other that ever had its number."""

    host: str
    """Name of its machine."""
    pid: int
    """Its number there."""
    born: int
    """When it was born (`dpo_core.system.birth`)."""

    def is_here(self) -> bool:
        """Whether it is or was one of this machine; others cannot be asked for."""
        return self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """Whether it has ended. Of another machine's nobody knows: then it is not."""
        if not self.is_here():
            return False
        try:
            return birth(self.pid) != self.born or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def myself() -> Owner:
    """This process."""
    return Owner(host=socket.gethostname(), pid=os.getpid(), born=birth(os.getpid()))
