"""Job server: loads the libraries once, then forks a rank for each job: `python -m dpo_core.job_server`.

It serves one run on one machine, whose jobs would otherwise each take seconds to load the same libraries.
Requests are lines of JSON on standard input, answers lines of JSON on standard output:
`{"job": ..., "log": ...}` starts a job and answers `{"pid": ...}`; `{"pid": ...}` answers `{"status": ...}`,
null while the job runs. At the end of its input it ends its jobs and exits.
"""

import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from dpo_core.system import end_with_parent

_LIBRARIES = (
    "dpo_core.training.engine",
    "transformers.models.llama.modeling_llama",
    "dpo_core.jobs.train",
    "dpo_core.jobs.evaluate",
    "dpo_core.jobs.import_model",
    "dpo_core.jobs.cache_reference",
    "dpo_core.jobs.sample_pairs",
    "dpo_core.trainers.dpo",
    "expectations.job",  # the data gate's kind of job; Great Expectations takes seconds to load
    "deepspeed",
)
_GRACE = 20.0


def main() -> int:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, _ignore)  # the launcher passes Ctrl-C on to the jobs
    signal.signal(signal.SIGHUP, _ignore)
    signal.signal(signal.SIGTERM, _ignore)
    # Output of libraries goes to standard error, so that standard output has only answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _load()
    jobs: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "job" in request:
            pid = os.fork()
            if pid == 0:
                _run(Path(request["job"]), Path(request["log"]))
            jobs[pid] = None
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"status": _status(request["pid"], jobs)}
        print(json.dumps(answer), file=answers, flush=True)
    _end([pid for pid in jobs if _status(pid, jobs) is None], jobs)
    return 0


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. SIG_IGN would be inherited by the programs that jobs start."""


def _load() -> None:
    from dpo_core.models.accelerator import set_accelerator  # noqa: PLC0415 - loads torch

    set_accelerator()  # DeepSpeed reads it when it is imported
    for name in _LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that garbage collection in the jobs does not copy every page


def _status(pid: int, jobs: dict[int, int | None]) -> int | None:
    """Exit status of a job, negative for a signal; None while it runs."""
    if jobs[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            jobs[pid] = os.waitstatus_to_exitcode(status)
    return jobs[pid]


def _end(running: list[int], jobs: dict[int, int | None]) -> None:
    deadline = time.monotonic() + _GRACE
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in running:
            if _status(pid, jobs) is None:
                os.kill(pid, number)
        while any(_status(pid, jobs) is None for pid in running) and time.monotonic() < deadline:
            time.sleep(0.05)


def _run(job: Path, log: Path) -> None:
    """Become the rank of a job; does not return."""
    status = 4
    try:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # If the server is killed, its jobs must end too: no other process collects their status.
        end_with_parent()
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, output), (2, output)):
            os.dup2(source, target)
        from dpo_core.job import main as run_job  # noqa: PLC0415 - in the fork

        status = run_job(["--config", str(job)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
