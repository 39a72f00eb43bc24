"""A run whose worker and process were killed is marked as crashed, and the next run starts."""

import json
import os
import signal
import time
from typing import Any
from urllib.error import HTTPError

import psutil
import pytest
import yaml

from tests.flows.cli.test_deploy_server import REPO, Site, site, until  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 30  # between heartbeats; the least that Prefect takes


def _file(site: Site) -> dict[str, Any]:  # noqa: F811
    shipped = yaml.safe_load((REPO / "deploy" / "prefect.yaml").read_text())
    deployment = shipped["deployments"][3]
    assert deployment["name"] == "on-demand"
    deployment["parameters"] = {"recipe": str(site.recipe)}
    deployment["work_pool"]["job_variables"]["env"] |= {
        "PYTHONPATH": str(REPO),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(SECONDS),
    }
    return {"pull": [], "deployments": [deployment]}


def _start(site: Site, deployment: str) -> str:  # noqa: F811
    """Ask for a run; a server on SQLite that is busy answers 503."""

    def created() -> Any:
        try:
            return site.ask(f"/deployments/{deployment}/create_flow_run", {})["id"]
        except HTTPError as error:
            if error.code != 503:
                raise
            return None

    return str(until(created, 60))


def test_a_run_that_fell_silent_is_crashed_and_holds_nobody_back(site: Site) -> None:  # noqa: F811
    path = site.folder / "zombies.yaml"
    path.write_text(yaml.safe_dump(_file(site)))
    short = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(SECONDS)}
    report = json.loads(site.dpo("deploy", "--file", str(path), "--json", **short))
    assert "dpo: crash runs that fell silent" in {change["place"] for change in report["changes"]}
    (deployment,) = site.ask("/deployments/filter", {"deployments": {"name": {"any_": ["on-demand"]}}})
    lost = _start(site, deployment["id"])

    def running() -> list[psutil.Process]:
        family = psutil.Process(site.running[-1].pid).children(recursive=True)
        events = site.ask(
            "/events/filter",
            {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}, "order": "DESC"}, "limit": 9},
        )["events"]
        return family if any(lost in event["resource"]["prefect.resource.id"] for event in events) else []

    family = until(running, 180)
    os.kill(site.running[-1].pid, signal.SIGKILL)
    for process in family:
        process.kill()
    waiting = _start(site, deployment["id"])
    site.start("worker", "start", "--pool", "dpo", "--name", "two")

    def state(run: str) -> dict[str, Any]:
        return site.ask(f"/flow_runs/{run}")["state"]

    ended = until(lambda: (now := state(lost))["type"] != "RUNNING" and now, 4 * 3 * SECONDS)
    assert (ended["type"], ended["message"].split(":")[0]) == (
        "CRASHED",
        f"No heartbeat for {3 * SECONDS} s",
    )
    last = until(lambda: (now := state(waiting))["type"] in ("COMPLETED", "FAILED", "CRASHED") and now, 400)
    assert last["type"] == "COMPLETED", last
    # Longer than the silence that is allowed: what has ended well stays so.
    time.sleep(3 * SECONDS + 40)
    assert state(waiting)["type"] == "COMPLETED"
