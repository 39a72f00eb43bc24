"""What a killed run leaves behind: its temporary Prefect server and its trainers would go on.

The guard of a run (`flows.process.guard`) ends them. Where it was killed too, the next run ends the server,
which would idle for ever, and the trainers of a job that it starts again (`deploy.launchers.local`).
"""

import contextlib
import os
from collections.abc import Iterable

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


def end_family(owner: int, but: Iterable[int] = (), grace: float = 15.0) -> None:
    """End what the run with this number has started: trainers get the time to save, the server needs none."""
    alive = _family(owner, but)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(alive, timeout=grace)
    for process in _family(owner, but):  # looked for again: some may be born since
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _family(owner: int, but: Iterable[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        # Other users' cannot be read, and are none of ours.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == str(owner) and process.pid not in but:
                found.append(process)
    return found


def _is_server(cmdline: list[str] | None) -> bool:
    return any(part.startswith(_SERVER) for part in cmdline or ())
