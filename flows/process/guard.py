"""The supervisor of a run: a small process that cleans up after the run was killed.

A run that is killed (SIGKILL, out of memory) can neither end its trainers nor record its end. A run started
by a Prefect worker does not notice that the worker is gone: it would continue unseen, and no button would
stop it. The supervisor detects both. It has its own session, so that signals to the run do not reach it.
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
from flows.process.run_processes import end_processes_of, mark_own

_LOOK = 0.5
_GRACE = 20.0
"""Seconds that a run without its worker has to save and end."""
_LONGEST = 28
"""Maximum seconds that the supervisor outlives its run."""
_PATIENCE = 120.0
"""Maximum seconds for the supervisor to start, on a busy machine."""
_READY = b"ready"

log = logging.getLogger("dpo")


@contextmanager
def supervised(workspace: str | Path, tracking: Any) -> Iterator[None]:
    """Run the body in this process under a supervisor.

    Args:
        tracking: the recipe's `TrackingConfig`.

    Raises:
        StageFailed: the supervisor did not start.
    """
    mark_own()
    # Not passed on the command line, which all users can read: an address may contain a password.
    settings = {"workspace": str(Path(workspace).absolute()), "tracking": tracking.model_dump(mode="json")}
    guard = _start(json.dumps(settings).encode())
    try:
        yield
    except Exception:
        _dismiss(guard)
        raise
    # After a signal, the supervisor stays until this process has ended.
    _dismiss(guard)


def _start(settings: bytes) -> subprocess.Popen[bytes]:
    """Start a supervisor and wait until it is ready."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-m", "flows.process.guard", str(os.getpid())]
    guard = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    assert guard.stdin
    assert guard.stdout
    assert guard.stderr
    with guard.stdout, guard.stderr:
        with suppress(BrokenPipeError), guard.stdin:
            guard.stdin.write(settings)
        begun = select.select([guard.stdout], [], [], _PATIENCE)[0]
        if begun and os.read(guard.stdout.fileno(), len(_READY)) == _READY:
            return guard
        guard.kill()
        last = guard.stderr.read().decode(errors="replace").strip().splitlines()
    status = guard.wait()
    reason = last[-1] if last else f"no output (status {status})" if begun else "it does not answer"
    raise StageFailed(
        f"the supervisor of the run, which cleans up after a kill, did not start: {reason}",
        "Run again; if a module is missing, check that PYTHONPATH does not replace it",
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    if (status := guard.poll()) is not None:
        log.warning(
            "the supervisor of the run ended before it (status %s); had the run been killed, its processes "
            "would have continued",
            status,
        )
    guard.kill()
    guard.wait()


def main() -> None:
    """Wait for the run's end, then clean up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager signals every process of a unit
    number, settings = int(sys.argv[1]), {}
    with suppress(ValueError, psutil.NoSuchProcess):  # the run may have ended already
        settings = json.load(sys.stdin)
        run = psutil.Process(number)
        _report_ready()
        _watch(run, worker_of(run))
    signal.alarm(_LONGEST)  # the next run does what is not finished by then
    # Close the records while the trainers save: importing MLflow takes seconds.
    closing = threading.Thread(target=_close, args=[settings, number])
    closing.start()
    end_processes_of(number, but=[os.getpid()])
    closing.join()


def _report_ready() -> None:
    """Tell the run to begin, then discard all output, which nobody reads from now on."""
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)


def worker_of(run: psutil.Process) -> psutil.Process | None:
    """The Prefect worker that started a run; None if no worker did."""
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
    """Wait until the run has ended. If its worker is gone, terminate the run, and kill it after a grace
    time."""
    orphaned: float | None = None
    while _lives(run):
        if worker and orphaned is None and not _lives(worker):
            orphaned = time.monotonic()
            run.terminate()
        if orphaned is not None and time.monotonic() - orphaned > _GRACE:
            run.kill()
        time.sleep(_LOOK)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _left_running(workspace: Path, number: int) -> bool:
    """Whether a record still says that the run with this process id is running."""
    for path in (workspace / "runs").glob("*/run.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text())
            if record["status"] == "running" and record["owner"]["pid"] == number:
                return True
    return False


def _close(settings: dict[str, Any], number: int) -> None:
    _close_records(settings, number)
    _report_crash()


def _report_crash() -> None:
    """Set a flow run that is still Running to Crashed, because a worker that is stopped does not do so.

    The worker itself reports a run that is being cancelled.
    """
    flow_run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if not flow_run:
        return
    # Imported only after a kill, so that the supervisor starts at once and stays small.
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.states import Crashed  # noqa: PLC0415

    from flows.process.prefect_server import server_address  # noqa: PLC0415

    if server_address() is None:  # a client would start its own server, which does not have the run
        return
    with suppress(Exception), get_client(sync_client=True) as client:  # the server may be gone too
        state = client.read_flow_run(UUID(flow_run)).state
        if state is not None and state.is_running():
            client.set_flow_run_state(UUID(flow_run), Crashed(message="Its process is gone."))


def _close_records(settings: dict[str, Any], number: int) -> None:
    """Record in the workspace and in MLflow that the run was killed, if it did not record its end."""
    if not settings or not _left_running(Path(settings["workspace"]), number):
        return
    # Imported only after a kill; MLflow takes seconds.
    from tasks.recipe.sections import TrackingConfig  # noqa: PLC0415
    from tasks.runs.record import close_abandoned  # noqa: PLC0415
    from tasks.tracking.tracker import Tracker  # noqa: PLC0415

    tracker = Tracker(TrackingConfig.model_validate(settings["tracking"]), settings["workspace"])
    close_abandoned(settings["workspace"], tracker)


if __name__ == "__main__":
    main()
