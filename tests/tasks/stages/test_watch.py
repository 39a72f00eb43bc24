"""Watching a job: what it does while it is being cancelled is seen too."""

from pathlib import Path
from typing import Any

import pytest

from deploy.launchers import State
from tasks.signals import Stop
from tasks.stages.job import watch


class Launcher:
    """A job that makes one more step when it is cancelled, and is interrupted at its first poll."""

    pause = 0.0

    def __init__(self) -> None:
        self.steps = 1

    def submit(self, *_: Any) -> str:
        return "job"

    def poll(self, _: str) -> State:
        raise KeyboardInterrupt

    def cancel(self, _: str) -> None:
        self.steps += 1


def test_the_last_step_of_a_cancelled_job_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stop, "begin", lambda *_: None)
    launcher: Any = Launcher()
    seen = []
    with pytest.raises(KeyboardInterrupt):
        watch("train", launcher, tmp_path / "job.json", 1, Stop(), lambda: seen.append(launcher.steps))
    assert seen == [2]
