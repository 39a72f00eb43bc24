"""`dpo doctor` on a real Prefect server without a worker, deployments or alerts."""

from collections.abc import Iterator
from contextlib import suppress

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.housekeeping.doctor import prefect
from tasks.housekeeping.doctor.check_result import CheckResult
from tasks.housekeeping.doctor.http import ask
from tests.flows.cli.test_deploy_server import Site, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        port = site.api.rsplit(":", 1)[1].removesuffix("/api")
        site.start("server", "start", "--host", "127.0.0.1", "--port", port)
        until(lambda: not isinstance(ask("GET", f"{site.api}/health"), str), 180)
        yield site
    finally:
        running = [psutil.Process(process.pid) for process in site.running]
        family = [child for process in running for child in process.children(recursive=True)]
        for process in (*running, *family):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _look(site: Site) -> dict[str, CheckResult]:
    with temporary_settings({PREFECT_API_URL: site.api}):
        return {finding.check: finding for finding in prefect.server()}


def test_a_server_alone_lacks_everything(site: Site) -> None:
    findings = _look(site)
    assert findings["prefect"].state == "ok"
    assert findings["work pool"].remedy == "prefect work-pool create dpo --type process"
    assert findings["deployments"].remedy.startswith("dpo deploy --file FILE; ")
    assert "is missing" in findings["lost runs"].says
    assert findings["alerts"].state == "warning"


def test_a_pool_without_a_worker_and_then_with_everything(site: Site) -> None:
    httpx.post(f"{site.api}/work_pools/", json={"name": "dpo", "type": "process"}).raise_for_status()
    findings = _look(site)
    assert (findings["worker"].state, findings["worker"].remedy) == (
        "failure",
        "prefect worker start --pool dpo",
    )
    site.dpo("deploy", DPO_NOTIFY_URL="http://127.0.0.1:9/hook")
    site.start("worker", "start", "--pool", "dpo")
    until(lambda: _look(site)["worker"].state == "ok", 180)
    findings = _look(site)
    assert {name: f.state for name, f in findings.items()} == dict.fromkeys(findings, "ok")
