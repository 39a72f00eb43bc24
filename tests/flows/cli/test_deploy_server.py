"""What `dpo deploy` leaves to a real server and worker: runs by the clock and by events, and who is told."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.scenarios.bad_inputs import good_rows, lines
from tests.support.sites.prefect_site import REPO, Site, until

pytestmark = pytest.mark.slow

SECRET = "canary-7f3e"
SOON = timedelta(seconds=120)  # deploying and pausing take a third of it or less


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            site.told.append({"path": self.path, **json.loads(body)})
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    site.hook = f"http://127.0.0.1:{receiver.server_port}/{SECRET}"
    try:
        site.open()
        yield site
    finally:
        receiver.shutdown()
        receiver.server_close()
        site.close()


def file_of(site: Site, anchor: datetime) -> dict[str, Any]:
    """The shipped file's deployments on the tiny recipe, with schedules that begin soon."""
    shipped = yaml.safe_load((REPO / "deploy" / "prefect.yaml").read_text())
    nightly, new_data = shipped["deployments"][:2]
    for one in (nightly, new_data):
        one["parameters"] = {"recipe": str(site.recipe)}
        one["work_pool"]["job_variables"]["env"]["PYTHONPATH"] = str(REPO)
    soon = {"interval": 3600, "anchor_date": anchor.isoformat(), "timezone": "UTC"}
    nightly["schedules"] = [{"slug": "soon", "active": True, **soon}]
    held = {**nightly, "name": "held", "tags": ["dpo"]}
    held["schedules"] = [
        {"slug": "held", "active": False, **soon},
        {"slug": "stopped", "active": True, **soon},
    ]
    return {"pull": [], "deployments": [nightly, new_data, held]}


@pytest.fixture(scope="module")
def deployed(site: Site) -> datetime:
    """When the schedules fire first; deployed ahead of it, and one of them paused by hand."""
    anchor = datetime.now(UTC) + SOON
    path = site.folder / "prefect.yaml"
    path.write_text(yaml.safe_dump(file_of(site, anchor)))
    told = json.loads(site.dpo("deploy", "--file", str(path), "--json", DPO_NOTIFY_URL=site.hook))
    assert told["applied"]
    assert SECRET not in json.dumps(told)
    site.dpo("schedule", "pause", "stopped")
    assert datetime.now(UTC) < anchor, "deploying took longer than the first firing was away"
    return anchor


def test_a_scheduled_run_fires_and_completes(site: Site, deployed: datetime) -> None:
    run = site.ended("nightly")
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert run["auto_scheduled"]
    assert datetime.fromisoformat(run["expected_start_time"]) == deployed
    # A worker fetches runs a little ahead, and sleeps to the moment as well as a clock can.
    late = datetime.fromisoformat(run["start_time"]) - deployed
    assert timedelta(seconds=-1) < late < timedelta(seconds=120)
    (record,) = (site.home / "runs" / "runs").glob("*/run.json")
    kept = json.loads(record.read_text())
    assert kept["status"] == "done"
    assert kept["command"] == f"dpo run {site.recipe}"
    logs = site.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert "dpo" in {line["name"] for line in logs}, "what the run says of itself is on its page in Prefect"


def test_paused_schedules_do_not_fire(site: Site, deployed: datetime) -> None:
    # Same time, same pool, same recipe as the one that has fired.
    site.ended("nightly")
    assert datetime.now(UTC) > deployed
    assert site.runs("held") == []


@pytest.fixture(scope="module")
def arrived(site: Site, deployed: datetime) -> tuple[Path, Path]:
    """Two data sets, told of one right after the other; of the second the gate refuses every row."""
    good, same = site.home / 'new: "data".jsonl', site.home / "same.jsonl"
    good.write_text(lines(good_rows(32)))
    same.write_text(lines([{**row, "rejected": row["chosen"]} for row in good_rows()]))
    for path in (good, same):
        site.dpo("event", "new-data", str(path))
    return good, same


def test_an_event_with_a_new_data_set_starts_a_run_on_it(site: Site, arrived: tuple[Path, Path]) -> None:
    run = site.ended("new-data")
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert run["parameters"]["data"] == str(arrived[0])
    kept = [json.loads(path.read_text()) for path in (site.home / "runs" / "runs").glob("*/run.json")]
    assert any(json.dumps(str(arrived[0]))[1:-1] in record["command"] for record in kept)


def test_a_second_run_waits_for_the_first(site: Site, arrived: tuple[Path, Path]) -> None:
    first, second = site.ended("new-data"), site.ended("new-data", 2)
    told = datetime.fromisoformat(second["expected_start_time"])
    freed = datetime.fromisoformat(first["end_time"])
    assert told < freed, "it was asked for while the first one ran"
    assert datetime.fromisoformat(second["start_time"]) >= freed


def test_a_refusal_by_the_gate_is_told_and_is_no_failure(site: Site, arrived: tuple[Path, Path]) -> None:
    run = site.ended("new-data", 2)
    assert run["parameters"]["data"] == str(arrived[1])
    assert (run["state_name"], run["state_type"]) == ("GateRefused", "FAILED")
    (told,) = until(lambda: [one for one in site.told if one["alert"] == "refused by the gate"], 30)
    assert told["path"] == f"/{SECRET}"
    assert told["event"] == "prefect.flow-run.GateRefused"
    assert told["text"].startswith(f"new-data {run['name']}: ")
    assert "pairs/identical" in told["text"]
    assert f"/flow-run/{run['id']}" in told["text"], "and where to look"
    assert "failed" not in {one["alert"] for one in site.told}


def test_a_failed_run_a_refused_promotion_and_a_late_run_are_told(site: Site, deployed: datetime) -> None:
    number = len(site.runs("new-data")) + 1
    empty = site.home / "empty.jsonl"
    empty.write_text("")
    site.dpo("event", "new-data", str(empty))
    assert site.ended("new-data", number)["state_name"] == "Failed"
    told = until(lambda: [one for one in site.told if one["alert"] == "failed"], 30)
    assert "empty.jsonl is empty" in told[0]["text"]

    code = (
        "from flows.process.prefect_server import server\n"
        "from tasks.scheduling.events import promotion_refused\n"
        "with server() as client: promotion_refused(client, 'dpo-tiny', '3', 'the KL is 9')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, env=site.environment(), check=True, timeout=600)
    told = until(lambda: [one for one in site.told if one["alert"] == "promotion refused"], 30)
    assert told[0]["text"] == "the KL is 9"

    site.ask("/work_pools/", {"name": "deserted", "type": "process"})
    body = yaml.safe_load((site.folder / "prefect.yaml").read_text())
    body["deployments"] = [{**body["deployments"][0], "name": "late", "schedules": []}]
    body["deployments"][0]["work_pool"] |= {"name": "deserted"}
    (site.folder / "late.yaml").write_text(yaml.safe_dump(body))
    site.dpo("deploy", "--file", str(site.folder / "late.yaml"))
    (found,) = site.ask("/deployments/filter", {"deployments": {"name": {"any_": ["late"]}}})
    site.ask(f"/deployments/{found['id']}/create_flow_run", {})
    told = until(lambda: [one for one in site.told if one["alert"] == "late"], 60)
    assert told[0]["event"] == "prefect.flow-run.Late"


def test_a_killed_run_is_told_as_crashed(site: Site, deployed: datetime) -> None:
    number = len(site.runs("new-data")) + 1
    (site.home / "killed.jsonl").write_text(lines(good_rows(28)))
    site.dpo("event", "new-data", str(site.home / "killed.jsonl"))

    def running() -> list[psutil.Process]:
        begun = [run["id"] for run in site.runs("new-data")[number - 1 :] if run["state_type"] == "RUNNING"]
        workers = psutil.Process(site.running[1].pid).children(recursive=True)
        return [one for one in workers if one.environ().get("PREFECT__FLOW_RUN_ID") in begun]

    for process in until(running, 120):
        process.kill()
    assert site.ended("new-data", number)["state_name"] == "Crashed"
    until(lambda: [one for one in site.told if one["alert"] == "crashed"], 30)


def test_deploying_again_changes_nothing_and_what_vanished_is_removed(site: Site, deployed: datetime) -> None:
    path = site.folder / "prefect.yaml"

    def deploy(*more: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            site.dpo("deploy", "--file", str(path), "--json", *more, DPO_NOTIFY_URL=site.hook)
        )
        return answer

    # Paused by hand above: the file has the last word, and says so.
    assert [change["text"] for change in deploy()["changes"]] == [
        "~ held schedule stopped active: false -> true"
    ]
    again = deploy()
    assert (again["changes"], again["applied"]) == ([], False)
    body = yaml.safe_load(path.read_text())
    del body["deployments"][2]["schedules"][1]
    body["deployments"][1]["triggers"] = []
    path.write_text(yaml.safe_dump(body))
    places = {(change["kind"], change["place"]) for change in deploy("--dry-run")["changes"]}
    assert places == {("removed", "held schedule stopped"), ("removed", "new-data trigger dpo new data")}
    assert deploy()["applied"]
    assert deploy()["changes"] == []
    assert "stopped" not in site.dpo("schedule", "list")
    names = {one["name"] for one in site.ask("/automations/filter", {})}
    assert "dpo new data" not in names
    assert "dpo alert: failed" in names
    gone = json.loads(site.dpo("deploy", "--file", str(path), "--json", DPO_NOTIFY_URL="none"))
    assert len(gone["changes"]) == 6, "the address and its alerts; what ends lost runs stays"
    assert not [one for one in site.ask("/automations/filter", {}) if one["name"].startswith("dpo alert")]


def test_the_address_is_in_no_log(site: Site, deployed: datetime) -> None:
    for log in site.folder.glob("*.log"):
        assert SECRET not in log.read_text(errors="replace"), log.name
