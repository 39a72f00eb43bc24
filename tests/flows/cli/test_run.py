"""What `dpo run` prints after a failed stage."""

from pathlib import Path

import pytest

from dpo_core.errors import GateRefused, NeedsNewSettings, StageFailed
from flows.commands.run import resume_line_on_failure


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (StageFailed("a disk is full", "Free some space"), "to resume: dpo run demo --resume\n"),
        (NeedsNewSettings("the loss is nan", "Lower the learning rate"), ""),
        (GateRefused("a rule failed"), ""),
        (OSError("no space"), "to resume: dpo run demo --resume\n"),
    ],
)
def test_resuming_is_offered_where_it_can_help(
    error: Exception, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)), resume_line_on_failure(str(tmp_path), "dpo run demo --resume"):
        raise error
    assert capsys.readouterr().err == printed


def test_an_error_that_needs_new_settings_says_how_to_go_on() -> None:
    error = NeedsNewSettings("the loss is nan", "Lower the learning rate")
    assert str(error).endswith(
        "Lower the learning rate, and start the run again without --resume: finished stages are not run again"
    )
    assert NeedsNewSettings(error.problem, error.remedy).remedy == error.remedy
