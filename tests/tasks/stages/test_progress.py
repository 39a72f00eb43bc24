"""Progress of a stage in the log, without a terminal."""

import logging
from pathlib import Path

import pytest

from tasks.stages import progress as stage
from tests.support.runs.contexts import make_context


def test_a_long_stage_tells_its_progress_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_context(tmp_path)
    monkeypatch.setattr(context.prefect_artifacts, "send", lambda call: None)
    monkeypatch.setattr(stage.sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(logging.getLogger("dpo"), "propagate", True)
    clock = [0.0]
    monkeypatch.setattr(stage.time, "monotonic", lambda: clock[0])
    bar = stage.Progress("train-ppo", 12, context.stop, context.prefect_artifacts, "updates")
    with caplog.at_level(logging.INFO, "dpo"):
        for done, clock[0] in ((1, 30.0), (2, 61.0), (3, 90.0), (4, 130.0)):
            bar.update(done)
        whole = stage.Progress("import-model", 1, context.stop, context.prefect_artifacts)
        clock[0] = 300.0
        whole.update(1)  # a stage that counts nothing has nothing to say before its end
    assert [record.getMessage() for record in caplog.records] == [
        "train-ppo: 2 of 12 updates",
        "train-ppo: 4 of 12 updates",
    ]
