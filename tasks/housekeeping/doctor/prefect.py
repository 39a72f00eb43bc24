"""Checks of Prefect: server, work pools, workers, deployments, late runs and automations."""

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import httpx
from prefect.settings import get_current_settings

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, skipped, warning
from tasks.housekeeping.doctor.http import SECONDS, ask, skew
from tasks.scheduling.alerts import ALERTS, PREFIX
from tasks.scheduling.heartbeats import HEARTBEAT_AUTOMATION
from tasks.scheduling.prefect_home import REMEDY, unwritable_home

_FLOW = "dpo"


class Api:
    """The REST API of a Prefect server."""

    def __init__(self, address: str, auth: tuple[str, str] | None) -> None:
        self.address, self._auth = address.rstrip("/"), auth

    def get(self, path: str) -> httpx.Response | str:
        return ask("GET", self.address + path, auth=self._auth)

    def post(self, path: str, **body: Any) -> Any:
        answer = ask("POST", self.address + path, json=body, auth=self._auth)
        if isinstance(answer, str):
            raise TimeoutError(f"{path}: {answer}")
        return answer.raise_for_status().json()


def server() -> Iterator[CheckResult]:
    """All checks of the configured server; without one, runs start temporary servers."""
    settings = get_current_settings()
    address = settings.api.url
    if address is None:
        yield skipped("prefect", "no server is configured (PREFECT_API_URL): runs start temporary ones")
        return
    secret = settings.api.auth_string.get_secret_value() if settings.api.auth_string else ""
    user, _, password = secret.partition(":")
    api = Api(str(address), (user, password) if secret else None)
    answer = api.get("/admin/version")
    if isinstance(answer, str):
        remedy = "Start it: prefect server start; or unset PREFECT_API_URL"
        yield failure("prefect", f"{address} does not answer within {SECONDS:.0f} s ({answer})", remedy)
        return
    if answer.status_code == 401:
        remedy = "export PREFECT_API_AUTH_STRING=user:password, the server's PREFECT_SERVER_API_AUTH_STRING"
        yield failure("prefect", f"{address} requires a valid user name and password", remedy)
        return
    if answer.status_code != 200:
        remedy = "Check PREFECT_API_URL; it ends in /api, as in http://127.0.0.1:4200/api"
        says = f"{address} answers {answer.status_code} and is not a Prefect server"
        yield failure("prefect", says, remedy)
        return
    remote, local = str(answer.json()), version("prefect")
    if remote != local:
        says = f"the server has version {remote}, this machine has {local}"
        yield warning("prefect", says, "Install the same version on both, on the server first")
    else:
        yield ok("prefect", f"{address} answers, version {remote}")
    yield from skew("prefect", answer)
    for check in (_workers, _deployments, _late, _automations):
        yield from check(api)
    if settings.flows.heartbeat_frequency is None:
        remedy = "unset PREFECT_FLOWS_HEARTBEAT_FREQUENCY, or set it to 180"
        yield warning("heartbeats", "runs send no heartbeats: a lost run stays Running for ever", remedy)


def _workers(api: Api) -> Iterator[CheckResult]:
    deployed = api.post("/deployments/filter", limit=200)
    used = {d["work_pool_name"] for d in deployed if d.get("work_pool_name")}
    pools = {pool["name"]: pool for pool in api.post("/work_pools/filter", limit=200)}
    if not pools:
        remedy = "prefect work-pool create dpo --type process"
        yield warning("work pool", "the server has no work pool: scheduled runs cannot start", remedy)
    for name in sorted(used - set(pools)):
        says = f"{name} does not exist, but deployments use it"
        yield failure("work pool", says, f"prefect work-pool create {name} --type process")
    for name in sorted(used & set(pools) or set(pools)):
        if pools[name].get("is_paused"):
            yield warning("work pool", f"{name} is paused", f"prefect work-pool resume {name}")
        workers = api.post(f"/work_pools/{name}/workers/filter", limit=200)
        online = [worker["name"] for worker in workers if worker.get("status") == "ONLINE"]
        if online:
            yield ok("worker", f"{len(online)} online in {name}")
        else:
            last = max((worker.get("last_heartbeat_time") or "" for worker in workers), default="")
            says = f"no worker is online in {name}" + (
                f"; the last heartbeat was at {last[:16]}" if last else ""
            )
            yield failure("worker", says, f"prefect worker start --pool {name}")


def _deployments(api: Api) -> Iterator[CheckResult]:
    deployments = api.post("/deployments/filter", limit=200)
    if not deployments:
        yield warning("deployments", "the server has no deployments", "dpo deploy")
        return
    yield ok("deployments", ", ".join(sorted(deployment["name"] for deployment in deployments)))
    for deployment in deployments:
        name, schedules = deployment["name"], deployment.get("schedules", ())
        slugs = [s.get("slug") or s["id"] for s in schedules if not s.get("active")]
        if deployment.get("paused"):
            yield warning("schedules", f"{name} is paused", f"prefect deployment resume {_FLOW}/{name}")
        elif slugs:
            yield ok("schedules", f"{name} has paused schedules: {', '.join(slugs)}")


def _late(api: Api) -> Iterator[CheckResult]:
    named = {"state": {"name": {"any_": ["Late"]}}}
    late = api.post("/flow_runs/filter", flow_runs=named, limit=200, sort="EXPECTED_START_TIME_ASC")
    if not late:
        yield ok("late runs", "none")
        return
    first = datetime.fromisoformat(late[0]["expected_start_time"].replace("Z", "+00:00"))
    hours = (datetime.now(UTC) - first).total_seconds() / 3600
    says = f"{len(late)} runs wait for a worker, the first for {hours:.1f} hours"
    remedy = "Start a worker, or see which runs use up the limit: prefect flow-run ls --state Running"
    yield warning("late runs", says, remedy)


def _automations(api: Api) -> Iterator[CheckResult]:
    automations = api.post("/automations/filter", limit=200)
    enabled = {automation["name"]: automation.get("enabled", True) for automation in automations}
    known = {deployment["id"] for deployment in api.post("/deployments/filter", limit=200)}
    for automation in automations:
        runs = {action["deployment_id"] for action in automation["actions"] if action.get("deployment_id")}
        if runs and not runs & known:
            says = f"{automation['name']} runs a deployment that does not exist"
            yield warning("triggers", says, "dpo deploy removes it, or delete the automation in the UI")
    if enabled.get(HEARTBEAT_AUTOMATION):
        yield ok("lost runs", "an automation ends them")
    else:
        says = "is disabled" if HEARTBEAT_AUTOMATION in enabled else "is missing"
        remedy = (
            "Enable it in the UI, or: dpo deploy"
            if HEARTBEAT_AUTOMATION in enabled
            else "dpo deploy creates it"
        )
        yield warning("lost runs", f"the automation that ends runs of dead workers {says}", remedy)
    if not any(name.startswith(PREFIX) for name in enabled):
        says = "no notification is configured for failed or late runs"
        yield warning("alerts", says, "export DPO_NOTIFY_URL=…, then dpo deploy")
    elif off := [name for name in ALERTS if not enabled.get(PREFIX + name)]:
        yield warning("alerts", f"missing or disabled: {', '.join(off)}", "dpo deploy")
    else:
        yield ok("alerts", f"{len(ALERTS)} automations{_delay(api)}")


def _delay(api: Api) -> str:
    """A note that some alerts are late, if the server uses Prefect's default event ordering."""
    answer = api.get("/admin/settings")
    with suppress(ValueError, LookupError, TypeError):
        settings = {} if isinstance(answer, str) else answer.json()
        if settings["server"]["events"]["causal_ordering"] == "tasks.scheduling.event_order":
            return ""
    return "; some come up to 15 minutes late (for the remedy see deploy/README.md, Alerts)"


def home() -> Iterator[CheckResult]:
    """Prefect's folder is writable; the temporary servers of runs keep their database there."""
    if problem := unwritable_home():
        yield failure("prefect home", f"{problem[0]} is not writable ({problem[1]})", REMEDY)
    else:
        yield ok("prefect home", "is writable")


def credentials() -> Iterator[CheckResult]:
    """PREFECT_API_AUTH_STRING, if set, has the form user:password."""
    text = os.environ.get("PREFECT_API_AUTH_STRING")
    if text is not None and ":" not in text:
        yield failure("prefect", "PREFECT_API_AUTH_STRING has no colon", "Write it as user:password")
