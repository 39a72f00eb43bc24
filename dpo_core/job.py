"""One rank of a job of any kind: `python -m dpo_core.job --config job.json`.

The job file names the kind (`dpo_core.jobs`), the inputs, the settings, and where to write. The same file
runs on one process, on many, and on a cluster. At the end `work/result.json` holds what rank 0 reports. Exit
status: 0 done, 2 bad input, 4 failed, 75 stopped on purpose.
"""

import argparse
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
from typing import TYPE_CHECKING, Any

from dpo_core import jobs
from dpo_core.errors import DpoError, RankLost, StageFailed
from dpo_core.jobs.files import ERROR, STOP_FILE
from dpo_core.redaction import redact
from dpo_core.system import write_atomic

if TYPE_CHECKING:
    from dpo_core.training.liveness import LivenessMonitor

STOPPED = 75  # EX_TEMPFAIL: run again and it goes on
RESULT = "result.json"


def module_of(kind: str) -> Any:
    """The module that runs a kind of job: `FILE`, the class of its job file, and `run`.

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
            f"there is no job of the kind '{kind}', only {', '.join(sorted(known))}",
            "Install the same version of dpo here as where the run was started",
        )
    return importlib.import_module(f"{jobs.__name__}.{name}")


def run(kind: Any, job: Any, monitor: "LivenessMonitor") -> None:
    """Run the job and write its result. Every rank calls this."""
    from dpo_core.models.remote_code import trust_digests

    work = Path(job.work)
    trust_digests(job.trusted_code)
    result = kind.run(job, monitor)
    if result is not None:
        # Its presence is the launcher's proof that the job finished.
        write_atomic(work / RESULT, json.dumps(result, indent=1))
    monitor.leave()


def main(argv: list[str] | None = None) -> int:
    """Entry point of each rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the job file (JSON)")
    config = json.loads(Path(parser.parse_args(argv).config).read_text())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    from dpo_core.training.liveness import LivenessMonitor
    from dpo_core.training.stop import Stopped

    work, agent = Path(config["work"]), os.getppid()
    monitor = LivenessMonitor(lambda what: _end_without(what, work))
    try:
        kind = module_of(config.get("kind", "train"))
        run(kind, kind.FILE.model_validate(config), monitor)
    except Stopped as stop:
        monitor.leave()
        # torchrun hides the exit status of its ranks; this file tells a stop from a failure.
        (work / STOP_FILE).touch()
        if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            return STOPPED
        if not stop.told:
            _pass_on_the_stop(agent)
        # Where torchrun replaces lost ranks it would also start again ranks that end with anything but 0.
        return 0
    except Exception as error:
        monitor.mute()
        print(redact(traceback.format_exc()), file=sys.stderr)
        _report(work, error)
        monitor.close()  # only now: the others do not write over what is there
        return error.exit_code if isinstance(error, DpoError) else 4
    return 0


def _end_without(what: str, work: Path) -> None:
    """End this rank although its main thread may hang in a collective; see `liveness.LivenessMonitor`."""
    from dpo_core.training.distributed import lost_rank

    error = lost_rank("gone or cut off", what)
    # The disk may have been on the lost node: then writing hangs.
    threading.Timer(5.0, os._exit, [error.exit_code]).start()
    _report(work, error)
    os._exit(error.exit_code)


def _pass_on_the_stop(agent: int) -> None:
    """Tell the torchrun of this node, which only saw its ranks end well, that the job was stopped.

    One that has restarts left would wait five minutes for the torchruns that were told, which are gone.
    """
    # Once for each node: a second signal would break off its orderly end.
    if os.environ.get("LOCAL_RANK") == "0" and os.getppid() == agent:
        os.kill(agent, signal.SIGTERM)


def _report(work: Path, error: Exception) -> None:
    """Leave the error where the launcher's caller finds it: ranks share no exception with it."""
    from dpo_core.training.distributed import lost_peer

    lost = lost_peer(error)
    if lost:
        error = lost
    elif not isinstance(error, DpoError):
        error = StageFailed(f"{type(error).__name__}: {error}", "Look at the log of the job")
    print(f"error: {error}", file=sys.stderr, flush=True)
    # The rank that fails by itself says why; those that only miss it do not write over that.
    rank = os.environ.get("RANK", "0")
    first = rank == "0" and not isinstance(error, RankLost)
    if first or not (work / ERROR).exists():
        facts = {"problem": error.problem, "remedy": error.remedy, "exit_code": error.exit_code}
        # Ranks may fail at the same moment; the file is always that of one of them.
        temporary = work / f"{ERROR}.{rank}.tmp"
        temporary.write_text(json.dumps(facts))
        os.replace(temporary, work / ERROR)


if __name__ == "__main__":
    status = main()
    if status not in (0, STOPPED):
        # An orderly exit may wait for collectives with ranks that are gone.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
