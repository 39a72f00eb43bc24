"""What a server keeps of deployments that are gone, and how soon it tells of runs that nobody takes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.commands.doctor import deploy_file
from tasks.housekeeping.doctor import prefect
from tests.support.sites.prefect_site import REPO, Site, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server, and no worker."""
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.serve(PREFECT_SERVER_EVENTS_CAUSAL_ORDERING="tasks.scheduling.event_order")
        site.ask("/work_pools/", {"name": "dpo", "type": "process"})
        yield site
    finally:
        site.close()


@contextmanager
def receiving() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook, and what it was told."""
    told: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{receiver.server_port}/hook", told
    receiver.shutdown()
    receiver.server_close()


def deploy(site: Site, deployments: list[Any], *more: str, **variables: str) -> list[str]:
    """The changes."""
    path = site.folder / "prefect.yaml"
    path.write_text(yaml.safe_dump({"pull": [], "deployments": deployments}))
    told = json.loads(site.dpo("deploy", "--file", str(path), "--json", *more, **variables))
    return [change["text"] for change in told["changes"]]


def shipped(site: Site) -> list[Any]:
    body = yaml.safe_load((REPO / "deploy" / "prefect.yaml").read_text())
    found: list[Any] = body["deployments"][:2]
    for one in found:
        one["parameters"] = {"recipe": str(site.recipe)}
    return found


def triggers(site: Site) -> list[str]:
    return [one["name"] for one in site.ask("/automations/filter", {}) if one["name"] == "dpo new data"]


def doubts(site: Site) -> list[str]:
    with temporary_settings({PREFECT_API_URL: site.api}):
        return [one.says for one in prefect.server() if one.check == "triggers"]


def compared(site: Site) -> str:
    """What `dpo doctor` says of the file that was deployed last, which it knows from the server."""
    environment = patch.dict(os.environ, DPO_HOME=str(site.home))
    with temporary_settings({PREFECT_API_URL: site.api}), environment:
        (result,) = deploy_file(None)
    return result.says


def test_triggers_go_with_their_deployment(site: Site) -> None:
    nightly, new_data = shipped(site)
    deploy(site, [nightly, new_data])
    assert triggers(site) == ["dpo new data"]
    assert compared(site) == f"the server matches {site.folder / 'prefect.yaml'}"
    assert "- new-data" in deploy(site, [nightly], "--prune")
    assert triggers(site) == []
    deploy(site, [nightly, new_data])
    # Somebody deletes it in the UI: Prefect leaves its automation.
    (found,) = site.ask("/deployments/filter", {"deployments": {"name": {"any_": ["new-data"]}}})
    site.ask(f"/deployments/{found['id']}", method="DELETE")
    assert triggers(site) == ["dpo new data"]
    assert doubts(site) == ["dpo new data runs a deployment that does not exist"]
    assert "differences to the server, first: " in compared(site)
    assert deploy(site, [nightly]) == ["- trigger dpo new data of a deleted deployment"]
    assert triggers(site) == []
    assert doubts(site) == []
    deploy(site, [nightly, new_data])
    assert triggers(site) == ["dpo new data"]
    assert deploy(site, [nightly, new_data]) == []


def test_prefect_deploys_the_same_file(site: Site) -> None:
    deployments = shipped(site)
    deploy(site, deployments)
    file = ["--prefect-file", str(site.folder / "prefect.yaml")]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", *file]
    subprocess.run(command, env=site.environment(), cwd=REPO, check=True, timeout=600)
    # The mark in its description and the tags that name the file are missing.
    assert compared(site) == "not compared with the server: name it with --file"
    changes = deploy(site, deployments, "--dry-run")
    assert [change.partition(":")[0] for change in changes] == [
        "~ nightly tags",
        "+ new-data trigger dpo new data",
        "~ new-data tags",
    ]
    assert deploy(site, deployments) == changes
    assert triggers(site) == ["dpo new data"]
    assert deploy(site, deployments) == []


def test_a_late_run_of_a_schedule_is_told_within_two_minutes(site: Site) -> None:
    with receiving() as (hook, told):
        nightly, _ = shipped(site)
        due = datetime.now(UTC) + timedelta(seconds=60)
        soon = {"interval": 3600, "anchor_date": due.isoformat(), "timezone": "UTC"}
        nightly["schedules"] = [{"slug": "soon", "active": True, **soon}]
        deploy(site, [nightly], DPO_NOTIFY_URL=hook)
        late = until(lambda: [one for one in told if one["alert"] == "late"], 240)
        seconds = (datetime.now(UTC) - due).total_seconds()
        assert late[0]["event"] == "prefect.flow-run.Late"
        assert seconds < 120, f"told {seconds:.0f} s after it was due"
