"""Checks of Prefect: the server, who works for it, and what it was told to do when nobody does."""

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import httpx

from tasks.housekeeping.doctor.finding import Finding, failure, ok, skipped, warning
from tasks.housekeeping.doctor.http import SECONDS, ask, skew
from tasks.scheduling.prefect_home import REMEDY, unwritable_home

_FLOW = "dpo"


class Api:
    """A Prefect server that answered."""

    def __init__(self, address: str, auth: tuple[str, str] | None) -> None:
        self.address, self._auth = address.rstrip("/"), auth

    def get(self, path: str) -> httpx.Response | str:
        return ask("GET", self.address + path, auth=self._auth)

    def post(self, path: str, **body: Any) -> Any:
        answer = ask("POST", self.address + path, json=body, auth=self._auth)
        if isinstance(answer, str):
            raise TimeoutError(f"{path}: {answer}")
        return answer.raise_for_status().json()


def server() -> Iterator[Finding]:
    """All about the server that is named; without one, runs start their own."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    address = settings.api.url
    if address is None:
        yield skipped("prefect", "no server is named (PREFECT_API_URL): runs start one of their own")
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
        yield failure("prefect", f"{address} asks for another name and password", remedy)
        return
    if answer.status_code != 200:
        remedy = "PREFECT_API_URL ends in /api: http://127.0.0.1:4200/api"
        yield failure("prefect", f"{address} answers {answer.status_code}, as no Prefect server does", remedy)
        return
    theirs, ours = str(answer.json()), version("prefect")
    if theirs != ours:
        says = f"the server is of version {theirs}, this is {ours}"
        yield warning("prefect", says, "Install the same on both, the server first")
    else:
        yield ok("prefect", f"{address} answers, version {theirs}")
    yield from skew("prefect", answer)
    for check in (_workers, _deployments, _late, _automations):
        yield from check(api)
    if settings.flows.heartbeat_frequency is None:
        remedy = "unset PREFECT_FLOWS_HEARTBEAT_FREQUENCY, or set it to 180"
        yield warning("heartbeats", "runs send none: a lost one stays Running for ever", remedy)


def _workers(api: Api) -> Iterator[Finding]:
    deployed = api.post("/deployments/filter", limit=200)
    used = {one["work_pool_name"] for one in deployed if one.get("work_pool_name")}
    pools = {pool["name"]: pool for pool in api.post("/work_pools/filter", limit=200)}
    if not pools:
        remedy = "prefect work-pool create dpo --type process"
        yield warning("work pool", "there is none: nothing scheduled can run", remedy)
    for name in sorted(used - set(pools)):
        yield failure("work pool", f"{name} is gone", f"prefect work-pool create {name} --type process")
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
                f", the last was heard of at {last[:16]}" if last else ""
            )
            yield failure("worker", says, f"prefect worker start --pool {name}")


def _deployments(api: Api) -> Iterator[Finding]:
    found = api.post("/deployments/filter", limit=200)
    if not found:
        yield warning("deployments", "there are none on the server", "dpo deploy")
        return
    yield ok("deployments", ", ".join(sorted(one["name"] for one in found)))
    for one in found:
        slugs = [s.get("slug") or s["id"] for s in one.get("schedules", ()) if not s.get("active")]
        if one.get("paused"):
            remedy = f"prefect deployment resume {_FLOW}/{one['name']}"
            yield warning("schedules", f"{one['name']} is paused", remedy)
        elif slugs:
            yield ok("schedules", f"paused of {one['name']}: {', '.join(slugs)}")


def _late(api: Api) -> Iterator[Finding]:
    named = {"state": {"name": {"any_": ["Late"]}}}
    late = api.post("/flow_runs/filter", flow_runs=named, limit=200, sort="EXPECTED_START_TIME_ASC")
    if not late:
        yield ok("late runs", "none")
        return
    first = datetime.fromisoformat(late[0]["expected_start_time"].replace("Z", "+00:00"))
    hours = (datetime.now(UTC) - first).total_seconds() / 3600
    says = f"{len(late)} wait for a worker, the first for {hours:.1f} hours"
    remedy = "Start a worker, or look who holds the limit: prefect flow-run ls --state Running"
    yield warning("late runs", says, remedy)


def _automations(api: Api) -> Iterator[Finding]:
    from tasks.scheduling.alerts import ALERTS, PREFIX
    from tasks.scheduling.heartbeats import ZOMBIES

    automations = api.post("/automations/filter", limit=200)
    found = {one["name"]: one.get("enabled", True) for one in automations}
    there = {one["id"] for one in api.post("/deployments/filter", limit=200)}
    for one in automations:
        runs = {action["deployment_id"] for action in one["actions"] if action.get("deployment_id")}
        if runs and not runs & there:
            says = f"{one['name']} asks for a deployment that is gone"
            yield warning("triggers", says, "dpo deploy removes it, or delete the automation in the UI")
    if found.get(ZOMBIES):
        yield ok("lost runs", "an automation ends them")
    else:
        says = "is off" if ZOMBIES in found else "is missing"
        remedy = "dpo deploy makes it" if ZOMBIES not in found else "Switch it on in the UI, or: dpo deploy"
        yield warning("lost runs", f"the automation that ends runs of dead workers {says}", remedy)
    if not any(name.startswith(PREFIX) for name in found):
        says = "nobody is told of failed and late runs"
        yield warning("alerts", says, "export DPO_NOTIFY_URL=…, then dpo deploy")
    elif off := [name for name in ALERTS if not found.get(PREFIX + name)]:
        yield warning("alerts", f"missing or off: {', '.join(off)}", "dpo deploy")
    else:
        yield ok("alerts", f"{len(ALERTS)} automations{_delay(api)}")


def _delay(api: Api) -> str:
    """That some alerts come late, where the server orders events as Prefect does by itself."""
    answer = api.get("/admin/settings")
    with suppress(ValueError, LookupError, TypeError):
        settings = {} if isinstance(answer, str) else answer.json()
        if settings["server"]["events"]["causal_ordering"] == "tasks.scheduling.event_order":
            return ""
    return "; some come up to 15 minutes late (deploy/README.md, Alerts, says which, and what ends it)"


def home() -> Iterator[Finding]:
    """Prefect can write its own folder, where the temporary servers of runs keep their database."""
    if found := unwritable_home():
        yield failure("prefect home", f"{found[0]} cannot be written ({found[1]})", REMEDY)
    else:
        yield ok("prefect home", "can be written")


def credentials() -> Iterator[Finding]:
    """A password that was given goes with a user's name."""
    text = os.environ.get("PREFECT_API_AUTH_STRING")
    if text is not None and ":" not in text:
        yield failure("prefect", "PREFECT_API_AUTH_STRING holds no colon", "Write it as user:password")
