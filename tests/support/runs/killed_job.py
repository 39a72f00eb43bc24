"""A training job that dies of SIGKILL in the middle: `python -m tests.support.runs.killed_job STEP JOB`.

It is the real entry point of a rank. It kills itself once the metrics of STEP are written and before that
step can be saved.
"""

import os
import signal
import sys

from dpo_core.job import main
from dpo_core.training.engine import MetricsFile

if __name__ == "__main__":
    last, job = int(sys.argv[1]), sys.argv[2]
    write = MetricsFile.write

    def write_and_die(self: MetricsFile, step: int, values: dict[str, float]) -> None:
        write(self, step, values)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.write = write_and_die  # type: ignore[method-assign]
    sys.exit(main(["--config", job]))
