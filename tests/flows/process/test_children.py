"""Processes end with the one that started them, and none imports a package of the current folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parents[3]
SLEEP = "import time; print(flush=True); time.sleep(300)"
CHILDREN = {
    "by itself": f"from dpo_core.system import end_with_parent; end_with_parent(); {SLEEP}",
    "by its command": SLEEP,
}


@pytest.mark.parametrize("way", CHILDREN)
def test_a_child_of_a_killed_process_ends(way: str) -> None:
    code = (
        "import subprocess, sys; from dpo_core.system import ending_with_parent\n"
        f"command = [sys.executable, '-c', {CHILDREN[way]!r}]\n"
        f"command = ending_with_parent(command) if {way == 'by its command'} else command\n"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_every_start_by_the_name_of_a_module_has_a_safe_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.launchers import torchrun

    unsafe = [
        str(path.relative_to(REPO))
        for package in ("flows", "tasks", "deploy", "expectations", "dpo_core")
        for path in sorted((REPO / package).rglob("*.py"))
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
