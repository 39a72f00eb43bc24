"""Entry point of one rank of a job of any kind: `python -m dpo_core.job --config job.json`.

The job file names the kind (`dpo_core.jobs`), the inputs, the settings and the output. The same file runs in
one process, in many, and on a cluster. At the end rank 0 writes `work/result.json`. Exit status: 0 done, 2
bad input, 4 failed, 75 stopped by a signal.
"""

import argparse
import gc
import importlib
import json
import logging
import os
import pkgutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from dpo_core import jobs
from dpo_core.errors import DpoError, NeedsNewSettings, RankLost, StageFailed
from dpo_core.jobs.files import ERROR, STOP_FILE, ModelJob
from dpo_core.jobs.start import start_ranks
from dpo_core.models.remote_code import trust_digests
from dpo_core.redaction import redact
from dpo_core.system import write_atomic
from dpo_core.training.distributed import lost_peer, lost_rank
from dpo_core.training.liveness import LivenessMonitor
from dpo_core.training.stop import Stopped

STOPPED = 75  # EX_TEMPFAIL: started again, the job resumes
RESULT = "result.json"


def module_of(kind: str) -> Any:
    """The module of a kind of job: `FILE`, the class of its job file, and `run`, which every rank calls.

    Args:
        kind: a module of `dpo_core.jobs`, or the full name of a module elsewhere.

    Raises:
        StageFailed: there is no such kind.
    """
    if "." in kind:
        return importlib.import_module(kind)
    name = kind.replace("-", "_")
    known = {entry.name for entry in pkgutil.iter_modules(jobs.__path__)} - {"files", "start"}
    if name not in known:
        raise StageFailed(
            f"there is no kind of job '{kind}', only {', '.join(sorted(known))}",
            "Install the same version of dpo here as where the run was started",
        )
    return importlib.import_module(f"{jobs.__name__}.{name}")


def run(kind: Any, job: Any, monitor: LivenessMonitor) -> None:
    """Run the job and write its result. Every rank calls this."""
    work = Path(job.work)
    trust_digests(job.trusted_code)
    if isinstance(job, ModelJob):
        ranks = start_ranks(work, job.ranks, monitor)
        rank = ranks.rank
        # A launcher may have started more: they must not all write the same files.
        result = None if job.one_rank and rank else kind.run(job, ranks)
    else:
        result, rank = kind.run(job, monitor), int(os.environ.get("RANK", "0"))
    if rank == 0:
        # Its presence is the launcher's proof that the job finished.
        write_atomic(work / RESULT, json.dumps(result, indent=1))
    monitor.leave()


def main(argv: list[str] | None = None) -> int:
    """Entry point of each rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the job file (JSON)")
    config = json.loads(Path(parser.parse_args(argv).config).read_text())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    work, agent = Path(config["work"]), os.getppid()
    monitor = LivenessMonitor(lambda detail: _exit_after_loss(detail, work))
    try:
        kind = module_of(config.get("kind", "train"))
        run(kind, kind.FILE.model_validate(config), monitor)
    except Stopped as stop:
        monitor.leave()
        # torchrun hides the exit status of its ranks; this file marks a stop, which is no failure.
        (work / STOP_FILE).touch()
        if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            return STOPPED
        if not stop.received:
            _stop_torchrun(agent)
        # With restarts, torchrun starts every rank again that exits with another status than 0.
        return 0
    except Exception as error:
        monitor.mute()
        print(redact(traceback.format_exc()), file=sys.stderr)
        _report(work, error)
        monitor.close()  # after the report: the other ranks fail now and must not overwrite it
        return error.exit_code if isinstance(error, DpoError) else 4
    return 0


def _exit_after_loss(detail: str, work: Path) -> None:
    """Exit although the main thread may hang in a collective; see `liveness.LivenessMonitor`."""
    error = lost_rank("gone or cut off", detail)
    # If the lost node served the disk, writing the report hangs.
    threading.Timer(5.0, os._exit, [error.exit_code]).start()
    _report(work, error)
    os._exit(error.exit_code)


def _stop_torchrun(agent: int) -> None:
    """Send SIGTERM to this node's torchrun, which has only seen its ranks exit with status 0.

    With restarts left it would otherwise wait five minutes for the torchruns that received the signal and
    have exited.
    """
    # Once for each node: a second signal would interrupt its orderly exit.
    if os.environ.get("LOCAL_RANK") == "0" and os.getppid() == agent:
        os.kill(agent, signal.SIGTERM)


def _report(work: Path, error: Exception) -> None:
    """Write the error to the work folder, where the process that launched the job reads it."""
    lost = lost_peer(error)
    if lost:
        error = lost
    elif not isinstance(error, DpoError):
        error = StageFailed(f"{type(error).__name__}: {error}", "See the traceback in the log of the job")
    print(f"error: {error}", file=sys.stderr, flush=True)
    # The error of the rank that failed has the cause; ranks that lost that rank must not overwrite it.
    rank = os.environ.get("RANK", "0")
    first = rank == "0" and not isinstance(error, RankLost)
    if first or not (work / ERROR).exists():
        facts = {
            "problem": error.problem,
            "remedy": error.remedy,
            "exit_code": error.exit_code,
            "resumable": not isinstance(error, NeedsNewSettings),
        }
        write_atomic(work / ERROR, json.dumps(facts))


if __name__ == "__main__":
    status = main()
    if status not in (0, STOPPED):
        # An orderly exit may wait for collectives with lost ranks.
        sys.stdout.flush()
        os._exit(status)
    gc.freeze()  # else Python scans a million objects of the libraries when it exits, for seconds
    sys.exit(status)
