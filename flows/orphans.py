"""The temporary Prefect server of a run that was killed: it does not notice and would go on."""

import contextlib
import os

import psutil

_MARK = "DPO_FLOW_PID"
_SERVER = "prefect.server.api.server"


def mark_own() -> None:
    """Processes started from now on carry this one's number."""
    os.environ[_MARK] = str(os.getpid())


def end_orphans() -> int:
    """End the temporary servers whose run is gone; returns how many. Other users are not touched."""
    ended = 0
    for process in psutil.process_iter(["cmdline", "uids"]):
        if process.info["uids"].real != os.getuid() or not _is_server(process.info["cmdline"]):
            continue
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            owner = process.environ().get(_MARK)
            if owner and not psutil.pid_exists(int(owner)):
                process.kill()
                ended += 1
    return ended


def find_orphans() -> list[psutil.Process]:
    """What a run that is gone started and left behind: its temporary server, its trainers."""
    found = []
    for process in psutil.process_iter(["uids"]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
            owner = process.environ().get(_MARK) if process.info["uids"].real == os.getuid() else None
            if owner and not psutil.pid_exists(int(owner)):
                found.append(process)
    return found


def _is_server(cmdline: list[str] | None) -> bool:
    return any(part.startswith(_SERVER) for part in cmdline or ())
