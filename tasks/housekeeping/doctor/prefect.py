"""Checks of Prefect: server, work pools, workers, deployments, late runs and automations."""

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import httpx
from prefect.settings import get_current_settings

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, skipped, warning
from tasks.housekeeping.doctor.http import SECONDS, ask
from tasks.scheduling.alerts import ALERTS, PREFIX
from tasks.scheduling.deployment_file import FILE_TAG
from tasks.scheduling.heartbeats import HEARTBEAT_AUTOMATION
from tasks.scheduling.prefect_home import REMEDY, unwritable_home

_FIRST = "dpo deploy --file FILE; dpo config deployment RECIPE prints such a file"
Rows = list[dict[str, Any]]


def server() -> Iterator[CheckResult]:
    """All checks of the configured server; without one, runs start temporary servers."""
    settings = get_current_settings()
    address = settings.api.url
    if address is None:
        yield skipped("prefect", "no server is configured (PREFECT_API_URL): runs start temporary ones")
        return
    secret = settings.api.auth_string.get_secret_value() if settings.api.auth_string else ""
    user, _, password = secret.partition(":")
    auth = (user, password) if secret else None
    answer = ask("GET", f"{address}/admin/version", auth=auth)
    if isinstance(answer, str):
        remedy = "Start it: prefect server start; or unset PREFECT_API_URL"
        yield failure("prefect", f"{address} does not answer within {SECONDS:.0f} s ({answer})", remedy)
    elif answer.status_code == 401:
        remedy = "export PREFECT_API_AUTH_STRING=user:password, the server's PREFECT_SERVER_API_AUTH_STRING"
        yield failure("prefect", f"{address} requires a valid user name and password", remedy)
    elif answer.status_code != 200:
        remedy = "Check PREFECT_API_URL; it ends in /api, as in http://127.0.0.1:4200/api"
        says = f"{address} answers {answer.status_code} and is not a Prefect server"
        yield failure("prefect", says, remedy)
    else:
        remote, local = str(answer.json()), version("prefect")
        if remote != local:
            says = f"the server has version {remote}, this machine has {local}"
            yield warning("prefect", says, "Install the same version on both, on the server first")
        else:
            yield ok("prefect", f"{address} answers, version {remote}")
        with httpx.Client(base_url=str(address), auth=auth, timeout=SECONDS) as api:
            yield from _server_content(api)
    if settings.flows.heartbeat_frequency is None:
        remedy = "unset PREFECT_FLOWS_HEARTBEAT_FREQUENCY, or set it to 180"
        yield warning("heartbeats", "runs send no heartbeats: a lost run stays Running for ever", remedy)


def _server_content(api: httpx.Client) -> Iterator[CheckResult]:
    deployments = _all(api, "/deployments")
    yield from _workers(api, {d["work_pool_name"] for d in deployments if d.get("work_pool_name")})
    yield from _deployments(deployments)
    late = {"state": {"name": {"any_": ["Late"]}}}
    yield from _late(_all(api, "/flow_runs", flow_runs=late, sort="EXPECTED_START_TIME_ASC"))
    ids = {deployment["id"] for deployment in deployments}
    yield from _automations(_all(api, "/automations"), ids, _deploy_again(deployments))


def _deploy_again(deployments: Rows) -> str:
    """The command that deploys the file of the server's deployments again: another one would change them."""
    tags = [tag for deployment in deployments for tag in deployment["tags"] if tag.startswith(FILE_TAG)]
    return f"dpo deploy --file {shlex.quote(tags[0].removeprefix(FILE_TAG)) if tags else 'FILE'}"


def _all(api: httpx.Client, path: str, **body: Any) -> Rows:
    rows: Rows = api.post(f"{path}/filter", json={"limit": 200, **body}).raise_for_status().json()
    return rows


def _workers(api: httpx.Client, used: set[str]) -> Iterator[CheckResult]:
    """Every work pool that deployments use exists and has a worker."""
    pools = {pool["name"]: pool for pool in _all(api, "/work_pools")}
    if not pools:
        remedy = "prefect work-pool create dpo --type process"
        yield warning("work pool", "the server has no work pool: scheduled runs cannot start", remedy)
    for name in sorted(used - set(pools)):
        says = f"{name} does not exist, but deployments use it"
        yield failure("work pool", says, f"prefect work-pool create {name} --type process")
    for name in sorted(used & set(pools) or set(pools)):
        if pools[name].get("is_paused"):
            yield warning("work pool", f"{name} is paused", f"prefect work-pool resume {name}")
        workers = _all(api, f"/work_pools/{name}/workers")
        online = [worker for worker in workers if worker.get("status") == "ONLINE"]
        if online:
            yield ok("worker", f"{len(online)} online in {name}")
        else:
            last = max((worker.get("last_heartbeat_time") or "" for worker in workers), default="")
            since = f"; the last heartbeat was at {last[:16]}" if last else ""
            says = f"no worker is online in {name}{since}"
            yield failure("worker", says, f"prefect worker start --pool {name}")


def _deployments(deployments: Rows) -> Iterator[CheckResult]:
    if not deployments:
        yield warning("deployments", "the server has no deployments", _FIRST)
        return
    yield ok("deployments", ", ".join(sorted(deployment["name"] for deployment in deployments)))
    for deployment in deployments:
        name, schedules = deployment["name"], deployment.get("schedules", ())
        slugs = [s.get("slug") or s["id"] for s in schedules if not s.get("active")]
        if deployment.get("paused"):
            yield warning("schedules", f"{name} is paused", f"prefect deployment resume dpo/{name}")
        elif slugs:
            yield ok("schedules", f"{name} has paused schedules: {', '.join(slugs)}")


def _late(late: Rows) -> Iterator[CheckResult]:
    if not late:
        yield ok("late runs", "none")
        return
    first = datetime.fromisoformat(late[0]["expected_start_time"])
    hours = (datetime.now(UTC) - first).total_seconds() / 3600
    says = f"{len(late)} runs wait for a worker, the first for {hours:.1f} hours"
    remedy = "Start a worker, or see which runs use up the limit: prefect flow-run ls --state Running"
    yield warning("late runs", says, remedy)


def _automations(automations: Rows, deployments: set[str], deploy: str) -> Iterator[CheckResult]:
    """The automations that end lost runs and send alerts exist, and none runs a deployment that is gone."""
    notify = f"export DPO_NOTIFY_URL=…, then {deploy}"
    enabled = {automation["name"]: automation.get("enabled", True) for automation in automations}
    for automation in automations:
        runs = {action["deployment_id"] for action in automation["actions"] if action.get("deployment_id")}
        if runs and not runs & deployments:
            says = f"{automation['name']} runs a deployment that does not exist"
            yield warning("triggers", says, f"{deploy} removes it, or delete the automation in the UI")
    if enabled.get(HEARTBEAT_AUTOMATION):
        yield ok("lost runs", "an automation ends them")
    else:
        says = "is disabled" if HEARTBEAT_AUTOMATION in enabled else "is missing"
        remedy = f"{deploy} creates it; enable a disabled one in the UI"
        yield warning("lost runs", f"the automation that ends runs of dead workers {says}", remedy)
    if not any(name.startswith(PREFIX) for name in enabled):
        says = "no notification is configured for failed or late runs"
        yield warning("alerts", says, notify)
    elif off := [name for name in ALERTS if not enabled.get(PREFIX + name)]:
        yield warning(
            "alerts", f"missing or disabled: {', '.join(off)}", f"{notify}; enable disabled ones in the UI"
        )
    else:
        yield ok("alerts", f"{len(ALERTS)} automations")


def home() -> Iterator[CheckResult]:
    """Prefect's folder is writable; the temporary servers of runs keep their database there."""
    if problem := unwritable_home():
        yield failure("prefect home", f"{problem[0]} is not writable ({problem[1]})", REMEDY)
    else:
        yield ok("prefect home", "is writable")
