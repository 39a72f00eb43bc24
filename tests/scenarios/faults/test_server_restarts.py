"""A run of a deployment, with its limit of one, on a real server that is restarted or away for minutes.

The process of such a run renews a lease for its place in the limit: at its start, and 225 s later.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.sites.prefect_site import REPO, Site, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
RENEWAL = 225.0
GOING = ("RUNNING", "SCHEDULED", "PENDING")

HELD = """\
import time
from pathlib import Path


def held(prompts: list[str], completions: list[str]) -> list[float]:
    here = Path(__file__).parent
    if prompts[0] != "The film was":  # the trial before the run
        (here / "reached").touch()
        while not (here / "go").exists():
            time.sleep(0.2)
    return [float(len(text)) for text in completions]
"""


class Shift:
    """A site whose deployment holds its run in the evaluation until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder)
        self.folder = folder / "reward"
        self.folder.mkdir()
        (self.folder / "held.py").write_text(HELD)
        recipe = self.site.world.recipe_of(
            workspace="./runs", reward={"source": f"{self.folder / 'held.py'}:held"}
        )
        self.site.recipe.write_text(yaml.safe_dump(recipe))

    def deploy(self) -> None:
        shipped = yaml.safe_load((REPO / "deploy" / "prefect.yaml").read_text())
        (one,) = [each for each in shipped["deployments"] if each["name"] == "on-demand"]
        one["parameters"] = {"recipe": str(self.site.recipe)}
        one["work_pool"]["job_variables"]["env"] |= {"PYTHONPATH": str(REPO)}
        path = self.site.folder / "prefect.yaml"
        path.write_text(yaml.safe_dump({"pull": [], "deployments": [one]}))
        self.site.dpo("deploy", "--file", str(path))

    def start(self) -> str:
        (found,) = self.site.ask("/deployments/filter", {"deployments": {"name": {"any_": ["on-demand"]}}})
        return str(self.site.ask(f"/deployments/{found['id']}/create_flow_run", {})["id"])

    def state(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.site.ask(f"/flow_runs/{run}")["state"]
        return found

    def record(self) -> dict[str, Any]:
        (path,) = (self.site.home / "runs" / "runs").glob("*/run.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def logs(self, run: str) -> str:
        query = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return "\n".join(line["message"] for line in self.site.ask("/logs/filter", query))


@pytest.fixture
def shift(tmp_path: Path) -> Iterator[Shift]:
    shift = Shift(tmp_path)
    try:
        shift.site.open()
        shift.deploy()
        yield shift
    finally:
        shift.site.close()


def away(shift: Shift, seconds: float) -> None:
    server = shift.site.running[0]
    os.killpg(server.pid, signal.SIGKILL)  # its own session: the group is the server's alone
    server.wait()
    shift.site.running.remove(server)
    time.sleep(seconds)
    shift.site.serve()


# Seconds from the start of the run until the server goes, and how long it is away.
WAYS = {
    "a restart, then a renewal": (10.0, 5.0),
    "away when the lease is to be renewed": (RENEWAL - 60, 120.0),
    "away for five minutes": (10.0, 300.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_a_deployment_goes_on_to_its_end(shift: Shift, way: str) -> None:
    run = shift.start()
    until((shift.folder / "reached").exists, 900)
    begun = time.monotonic()
    waiting = shift.start()
    goes, absent = WAYS[way]
    time.sleep(goes)
    away(shift, absent)
    time.sleep(max(0.0, begun + RENEWAL + 60 - time.monotonic()))
    assert shift.record()["status"] == "running", shift.record()
    assert shift.state(run)["type"] == "RUNNING"
    assert shift.state(waiting)["type"] == "SCHEDULED", "there is room for one run"
    (shift.folder / "go").touch()
    for one in (run, waiting):
        until(lambda one=one: shift.state(one)["type"] not in GOING, 600)
        assert shift.state(one)["type"] == "COMPLETED", shift.logs(one)
    kept = [json.loads(path.read_text()) for path in (shift.site.home / "runs" / "runs").glob("*/run.json")]
    assert [one["status"] for one in kept] == ["done", "done"]
