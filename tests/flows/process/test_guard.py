"""The guard of a run: what a killed run has started ends, and a run whose worker is gone is told to end."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.scenarios.faults.runs import MARK, Family

REPO = Path(__file__).resolve().parents[3]
RUN = """
import subprocess, sys, time
from pathlib import Path
from flows.process.guard import supervised
from tasks.recipe.sections import (TrackingConfig)
place = Path(sys.argv[1])
with supervised(place / "runs", TrackingConfig()):
    # In a session of its own, as torchrun starts its ranks.
    sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
    subprocess.Popen(sleeper, start_new_session=True)
    time.sleep(1)  # the guard is at work
    (place / "ready").touch()
    {then}
"""
WORKER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.fixture
def family() -> Iterator[Family]:
    family = Family(uuid.uuid4().hex)
    yield family
    family.end()


def start(
    tmp_path: Path, family: Family, then: str, *, worker: bool = False, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    run, prefect = tmp_path / "run.py", tmp_path / "prefect"
    run.write_text(RUN.format(then=then))
    prefect.write_text(WORKER)
    command = [sys.executable, *([str(prefect)] if worker else []), str(run), str(tmp_path)]
    environment = os.environ | {MARK: family.mark, "PYTHONPATH": str(REPO)}
    environment.pop("PREFECT__FLOW_RUN_ID", None)
    if worker:
        environment["PREFECT__FLOW_RUN_ID"] = str(uuid.uuid4())
    process = subprocess.Popen(command, env=environment, cwd=folder)
    deadline = time.monotonic() + 600
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_what_a_killed_run_has_started_ends(tmp_path: Path, family: Family) -> None:
    run = start(tmp_path, family, "time.sleep(300)")
    assert len(family.alive()) == 3, "the run, what it started, and the guard"
    run.kill()
    run.wait()
    assert family.gone_after() < 15


def test_a_package_of_the_same_name_in_the_folder_does_not_replace_the_guard(
    tmp_path: Path, family: Family
) -> None:
    own = tmp_path / "own"
    (own / "flows").mkdir(parents=True)
    (own / "flows" / "__init__.py").touch()
    run = start(tmp_path, family, "time.sleep(300)", folder=own)
    assert len(family.alive()) == 3, "the run, what it started, and the guard"
    run.kill()
    run.wait()
    assert family.gone_after() < 15


def test_every_start_by_the_name_of_a_module_has_a_safe_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.launchers import torchrun

    unsafe = [
        str(path.relative_to(REPO))
        for room in ("flows", "tasks", "deploy", "expectations", "dpo_core")
        for path in sorted((REPO / room).rglob("*.py"))
        if 'sys.executable, "-m"' in path.read_text()
    ]
    # torchrun starts the ranks with -m itself: there the environment has to say it.
    assert unsafe == ["deploy/launchers/torchrun.py"]
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    assert torchrun.environment()["PYTHONSAFEPATH"] == "1"
    assert torchrun.NODE_ENVIRONMENT["PYTHONSAFEPATH"] == "1"
    for template in (REPO / "deploy" / "work_pools").glob("*.json"):
        variables = json.loads(template.read_text())["variables"]["properties"]
        assert variables["env"]["default"]["PYTHONSAFEPATH"] == "1", template.name


def test_a_guard_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_core.errors import StageFailed
    from flows.process.guard import supervised
    from tasks.recipe.sections import TrackingConfig

    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("DPO_FLOW_PID", "")
    with (
        pytest.raises(StageFailed, match=r"did not start: .*No module named 'flows.process'"),
        supervised(tmp_path / "runs", TrackingConfig()),
    ):
        raise AssertionError("the run has begun without its guard")


def test_a_run_without_its_worker_is_told_to_end(tmp_path: Path, family: Family) -> None:
    worker = start(tmp_path, family, "time.sleep(300)", worker=True)
    assert len(family.alive()) == 4
    worker.kill()
    worker.wait()
    assert family.gone_after() < 15


def test_a_run_that_a_person_started_outlives_its_shell(tmp_path: Path, family: Family) -> None:
    shell = subprocess.Popen(
        ["bash", "-c", f"{sys.executable} -c 'import time; time.sleep(300)' & wait"],
        env=os.environ | {MARK: family.mark},
        start_new_session=True,
    )
    from flows.process.guard import worker_of

    assert worker_of(psutil.Process(shell.pid)) is None
    shell.kill()
    shell.wait()


def test_after_a_good_end_there_is_no_guard(tmp_path: Path, family: Family) -> None:
    run = start(tmp_path, family, "pass")
    assert run.wait(timeout=600) == 0
    (left,) = family.alive()
    assert "time.sleep(300)" in " ".join(left.cmdline()), "and what the run lets live, lives"
