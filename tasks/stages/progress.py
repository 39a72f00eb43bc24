"""Progress of a stage: a bar on the terminal, else a log line a minute, and a bar in Prefect."""

import logging
import sys
import time
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar

from tasks.signals import Stop
from tasks.stages.prefect_artifacts import PrefectArtifacts, artifact_key

log = logging.getLogger("dpo")

_LINE_SECONDS = 60.0


class Progress:
    """Progress of a stage: a bar on the terminal, else a log line a minute, and a bar in Prefect."""

    def __init__(
        self, stage: str, total: int, stop: Stop, artifacts: PrefectArtifacts, unit: str = "steps"
    ) -> None:
        self.stage, self.total, self._unit = stage, max(total, 1), unit
        self._stop, self._prefect = stop, artifacts
        self._last_line = time.monotonic()
        self._bar: Any = None
        self._last_sent = time.monotonic()
        key = f"progress-{artifact_key(stage)}"
        self._artifact: Any = self._prefect.send(
            lambda: create_progress_artifact(progress=0.0, key=key, description=stage)
        )
        if sys.stderr.isatty():
            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(escape(stage), total=self.total)

    def update(self, done: int) -> None:
        """Report that `done` units of the total are done."""
        self._stop.check()
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif self.total > 1 and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            log.info("%s: %d of %d %s", self.stage, done, self.total, self._unit)
        if time.monotonic() - self._last_sent > 3.0:
            self._send(done)

    def _send(self, done: int) -> None:
        self._last_sent = time.monotonic()
        share = min(100.0, 100.0 * done / self.total)
        if self._artifact is not None:
            self._prefect.send(lambda: update_progress_artifact(artifact_id=self._artifact, progress=share))

    def close(self, finished: bool) -> None:
        """Remove the bar; a finished stage ends at 100 %."""
        if self._bar:
            self._bar.stop()
        if finished:
            self._send(self.total)
