"""Records of runs: names, order and locks, also after clock changes and killed processes."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from dpo_core.errors import RecipeError
from tasks.runs.record import find_run, list_runs, new_run, run_lock, save_run
from tests.support.runs.stored import python

HOLD = """
import sys, time
from tasks.runs.record import run_lock
with run_lock(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def begun(workspace: Path, ahead: timedelta = timedelta()) -> str:
    """A new run on record; `ahead` is how much the clock went wrong when it began."""
    record = new_run(workspace, "tiny", "dpo run tiny")
    save_run(workspace, record.model_copy(update={"started_at": record.started_at + ahead}))
    return record.run_id


def test_runs_that_start_at_once_have_names_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: begun(tmp_path), range(16)))
    assert len(set(names)) == len(list_runs(tmp_path)) == 16


def test_the_newest_run_is_the_newest_though_the_clock_was_set_back(tmp_path: Path) -> None:
    names = [begun(tmp_path, timedelta(days=back)) for back in (400, 0, -30)]
    assert [record.run_id for record in list_runs(tmp_path)] == names[::-1]
    assert find_run(tmp_path, "latest", "tiny").run_id == names[2]


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A living process at work on the newest of two unfinished runs."""
    begun(tmp_path)
    process = python(HOLD, tmp_path, begun(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_that_is_being_done_is_not_gone_on_with(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    busy, free = [record.run_id for record in list_runs(tmp_path)]
    assert find_run(tmp_path, "latest", "tiny").run_id == free
    with pytest.raises(RecipeError, match=f"run {busy} is in progress: process {holder.pid} on"):
        run_lock(tmp_path, busy).__enter__()
    with run_lock(tmp_path, free), pytest.raises(RecipeError, match=f"{busy} is in progress"):
        find_run(tmp_path, "latest", "tiny")
    holder.kill()
    holder.communicate()
    assert find_run(tmp_path, "latest", "tiny").run_id == busy
    with run_lock(tmp_path, busy):
        pass
