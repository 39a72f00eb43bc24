"""The guard of a run: a small process that outlives it, to clean up where the run itself cannot any more.

A run that gets SIGKILL, from a person or for the memory it took, cannot end its trainers or write how it
ended. Nor does a run that a Prefect worker has started notice that its worker is gone: it would go on unseen,
and no button would stop it. The guard sees both. It is in a session of its own, where no signal to the run
reaches it.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from dpo_core.errors import StageFailed
from flows.process.orphans import end_family, mark_own

_LOOK = 0.5
_GRACE = 20.0
"""Seconds that a run without its worker has to save and to end."""
_LONGEST = 28
"""Seconds that the guard outlives its run."""
_PATIENCE = 120.0
"""Seconds for the guard to start, on a machine that is busy."""
_READY = b"ready"

log = logging.getLogger("dpo")


@contextmanager
def guarded(workspace: str | Path, tracking: Any) -> Iterator[None]:
    """Within it this process is the run, and has a guard.

    Args:
        tracking: the recipe's `TrackingConfig`.

    Raises:
        StageFailed: the guard did not start.
    """
    mark_own()
    # Not by its command line, which everybody on the machine can read: an address may hold a password.
    told = {"workspace": str(Path(workspace).absolute()), "tracking": tracking.model_dump(mode="json")}
    guard = _start(json.dumps(told).encode())
    try:
        yield
    except Exception:
        _dismiss(guard)
        raise
    # After a signal it stays, until this process has ended.
    _dismiss(guard)


def _start(told: bytes) -> subprocess.Popen[bytes]:
    """A guard that is at work."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-m", "flows.process.guard", str(os.getpid())]
    guard = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    assert guard.stdin
    assert guard.stdout
    assert guard.stderr
    with guard.stdout, guard.stderr:
        with suppress(BrokenPipeError), guard.stdin:
            guard.stdin.write(told)
        begun = select.select([guard.stdout], [], [], _PATIENCE)[0]
        if begun and os.read(guard.stdout.fileno(), len(_READY)) == _READY:
            return guard
        guard.kill()
        last = guard.stderr.read().decode(errors="replace").strip().splitlines()
    status = guard.wait()
    said = last[-1] if last else f"it says nothing (status {status})" if begun else "it does not answer"
    raise StageFailed(
        f"the guard of the run, which cleans up where the run is killed, did not start: {said}",
        "Run again; if a module is missing, PYTHONPATH puts another in its place",
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    if (status := guard.poll()) is not None:
        log.warning(
            "the guard of the run had ended before it (status %s); had the run been killed, its "
            "processes would have lived on",
            status,
        )
    guard.kill()
    guard.wait()


def main() -> None:
    """Wait for the run's end, then clean up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager tells every process of a unit
    number, told = int(sys.argv[1]), {}
    with suppress(ValueError, psutil.NoSuchProcess):  # it may be gone before the guard is there
        told = json.load(sys.stdin)
        run = psutil.Process(number)
        _report_ready()
        _watch(run, worker_of(run))
    signal.alarm(_LONGEST)  # what is not done by then is left to the next run
    # While the trainers save: MLflow takes seconds to import.
    closing = threading.Thread(target=_close, args=[told, number])
    closing.start()
    end_family(number, but=[os.getpid()])
    closing.join()


def _report_ready() -> None:
    """Let the run begin; from now on nobody reads what the guard prints."""
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)


def worker_of(run: psutil.Process) -> psutil.Process | None:
    """The Prefect worker that has started a run; None where a person has."""
    if "PREFECT__FLOW_RUN_ID" not in os.environ:
        return None
    with suppress(psutil.AccessDenied):
        return next((parent for parent in run.parents() if _is_prefect(parent)), None)
    return None


def _is_prefect(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(Path(word).name.split(".")[0] == "prefect" for word in process.cmdline()[:3])
    return False


def _watch(run: psutil.Process, worker: psutil.Process | None) -> None:
    """Return when the run is gone. One without its worker is told to end, and then made to."""
    alone: float | None = None
    while _lives(run):
        if worker and alone is None and not _lives(worker):
            alone = time.monotonic()
            run.terminate()
        if alone is not None and time.monotonic() - alone > _GRACE:
            run.kill()
        time.sleep(_LOOK)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _left_running(workspace: Path, number: int) -> bool:
    """Whether the run did not come to write its end."""
    for path in (workspace / "runs").glob("*/run.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text())
            if record["status"] == "running" and record["owner"]["pid"] == number:
                return True
    return False


def _close(told: dict[str, Any], number: int) -> None:
    _close_records(told, number)
    _tell_prefect()


def _tell_prefect() -> None:
    """Let a run that still reads Running be Crashed: a worker that is told to end does not say so.

    One that is being cancelled is its worker's to report.
    """
    flow_run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if not flow_run:
        return
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    from flows.process.prefect_server import server_address

    if server_address() is None:  # a client would start a server of its own, which knows nothing of the run
        return
    with suppress(Exception), get_client(sync_client=True) as client:  # the server may be gone as well
        state = client.read_flow_run(UUID(flow_run)).state
        if state is not None and state.is_running():
            client.set_flow_run_state(UUID(flow_run), Crashed(message="Its process is gone."))


def _close_records(told: dict[str, Any], number: int) -> None:
    """Let the record and MLflow say that the run was killed, where it did not come to say how it ended."""
    if not told or not _left_running(Path(told["workspace"]), number):
        return
    from tasks.recipe.sections import TrackingConfig
    from tasks.runs.record import close_abandoned
    from tasks.tracking.tracker import Tracker

    tracker = Tracker(TrackingConfig.model_validate(told["tracking"]), told["workspace"])
    close_abandoned(told["workspace"], tracker)


if __name__ == "__main__":
    main()
