"""A training job that dies of SIGKILL in the middle."""

import os
import signal
from pathlib import Path

from deploy.launchers.base import tail
from dpo_core.job import main
from dpo_core.training.engine import MetricsFile
from tests.support.runs import forked

_STEP = "STEP_OF_THE_KILL"


def kill_after(step: int, job: Path) -> None:
    """Run a job that kills itself once the metrics of the step are written and before it can be saved."""
    statuses = forked.ranks(job, 1, _die_after_a_step, **{_STEP: str(step)})
    assert statuses == [-signal.SIGKILL], tail(job.parent, 40)


def _die_after_a_step(arguments: list[str]) -> int:
    last, write = int(os.environ[_STEP]), MetricsFile.write

    def write_and_die(self: MetricsFile, step: int, values: dict[str, float]) -> None:
        write(self, step, values)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.write = write_and_die  # type: ignore[method-assign]
    return main(arguments)
