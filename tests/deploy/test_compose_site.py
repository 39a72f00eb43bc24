"""The site that compose.yaml describes, really run: databases, logins, the pool, and a run on its worker."""

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.scenarios.bad_inputs import World, good_rows, lines
from tests.support.models.tiny import make_tiny_model
from tests.support.sites.compose_site import PASSWORDS, POSTGRES, ComposeSite, until
from tests.support.sites.pool_templates import FOLDER as TEMPLATES
from tests.support.sites.pool_templates import GIVEN

pytestmark = pytest.mark.slow

NEEDED = ("psycopg2", "boto3", "flask_wtf", "moto", "flask_cors")
PREFECT, MLFLOW = f"dpo:{PASSWORDS['PREFECT_PASSWORD']}", f"admin:{PASSWORDS['MLFLOW_PASSWORD']}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeSite]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or POSTGRES is None:
        pytest.skip(
            f"needs Postgres and the extra `cloud`: {', '.join(missing) or 'no postgres'} is not here"
        )
    site = ComposeSite(tmp_path_factory.mktemp("compose"))
    try:
        site.start_postgres()
        site.start_object_store()
        for name in ("bucket", "bucket", "mlflow", "prefect", "deployments", "worker"):
            site.start(name)  # the bucket twice: compose runs it again at every start
        yield site
    finally:
        site.stop()


def test_nobody_comes_in_without_a_password(site: ComposeSite) -> None:
    search = {"max_results": 1}
    assert site.asked("mlflow", "/api/2.0/mlflow/experiments/search", body=search) == 401
    assert site.asked("mlflow", "/api/2.0/mlflow/experiments/search", "admin:password1234", search) == 401
    assert "experiments" in site.asked("mlflow", "/api/2.0/mlflow/experiments/search", MLFLOW, search)
    assert site.asked("mlflow", "/health", Host="elsewhere") == 200
    assert site.asked("mlflow", "/api/2.0/mlflow/experiments/search", body=search, Host="elsewhere") == 403
    assert site.asked("prefect", "/api/work_pools/filter", body={}) == 401
    assert site.asked("prefect", "/api/work_pools/filter", "dpo:x", {}) == 401
    assert [pool["name"] for pool in site.asked("prefect", "/api/work_pools/filter", PREFECT, {})] == ["dpo"]


def test_each_server_sees_its_own_database_alone(site: ComposeSite) -> None:
    def connect(user: str, database: str) -> int:
        address = f"host=127.0.0.1 port={site.ports['postgres']} user={user} dbname={database}"
        env = {"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORDS[f"{user.upper()}_DATABASE_PASSWORD"]}
        command = ["psql", address, "-c", "select 1"]
        return subprocess.run(command, env=env, capture_output=True, check=False).returncode

    assert [connect("mlflow", "mlflow"), connect("prefect", "prefect")] == [0, 0]
    assert connect("mlflow", "prefect") != 0
    assert connect("prefect", "mlflow_auth") != 0


@pytest.mark.parametrize("kind", sorted(GIVEN))
def test_a_real_server_takes_the_template_of_each_pool(site: ComposeSite, kind: str) -> None:
    made = site.run(
        "deployments",
        f"prefect work-pool create try-{kind} --type {kind} --base-job-template {TEMPLATES}/{kind}.json",
    )
    assert made.returncode == 0, made.stdout + made.stderr
    try:
        pool = site.asked("prefect", f"/api/work_pools/try-{kind}", PREFECT)
        assert pool["type"] == kind
        assert pool["base_job_template"] == json.loads((TEMPLATES / f"{kind}.json").read_text())
    finally:
        site.run("deployments", f"prefect --no-prompt work-pool delete try-{kind}")


def test_a_deployment_with_a_variable_that_the_pool_lacks_is_refused(site: ComposeSite) -> None:
    shipped = yaml.safe_load((TEMPLATES.parent / "prefect.yaml").read_text())
    nightly = shipped["deployments"][0]
    nightly["work_pool"]["job_variables"]["image"] = "dpo:cpu"
    path = site.folder / "image.yaml"
    path.write_text(yaml.safe_dump({"pull": [], "deployments": [nightly]}))
    done = site.run("deployments", f"dpo deploy --file {path} --dry-run")
    assert done.returncode == 2
    assert "the pool dpo, of type process, has no image" in done.stderr


def test_a_run_goes_through_the_worker_into_mlflow_and_the_object_store(site: ComposeSite) -> None:
    world = World(site.home, make_tiny_model(site.folder / "model"))
    (site.home / "good.jsonl").write_text(lines(good_rows()))
    recipe = site.home / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(world.recipe_of(workspace="./runs")))
    (found,) = site.asked(
        "prefect", "/api/deployments/filter", PREFECT, {"deployments": {"name": {"any_": ["on-demand"]}}}
    )
    asked = {"parameters": {"recipe": str(recipe)}}
    run = site.asked("prefect", f"/api/deployments/{found['id']}/create_flow_run", PREFECT, asked)

    def ended() -> dict | None:
        now = site.asked("prefect", f"/api/flow_runs/{run['id']}", PREFECT)
        return now if now["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

    state = until(ended, 480)["state"]
    assert state["type"] == "COMPLETED", state["message"]
    (record,) = (site.home / "runs" / "runs").glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "done"
    runs = site.asked(
        "mlflow",
        "/api/2.0/mlflow/runs/search",
        MLFLOW,
        {"experiment_ids": experiments(site), "max_results": 50},
    )["runs"]
    assert {one["info"]["status"] for one in runs} == {"FINISHED"}
    assert all(one["info"]["artifact_uri"].startswith("mlflow-artifacts:") for one in runs)
    import boto3

    store = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{site.ports['object-store']}", region_name="us-east-1",
        aws_access_key_id="dpo", aws_secret_access_key="x",
    )  # fmt: skip
    kept = {one["Key"].rsplit("/", 1)[1] for one in store.list_objects_v2(Bucket="mlflow")["Contents"]}
    assert "page.html" in kept


def experiments(site: ComposeSite) -> list[str]:
    found = site.asked("mlflow", "/api/2.0/mlflow/experiments/search", MLFLOW, {"max_results": 50})
    return [one["experiment_id"] for one in found["experiments"]]


def test_no_password_is_on_a_command_line_or_in_a_log(site: ComposeSite) -> None:
    family = [psutil.Process(one.pid) for one in site.running.values()]
    family += [child for one in family for child in one.children(recursive=True)]
    told = " ".join(part for one in family for part in one.cmdline())
    for path in [*site.folder.glob("*.log"), *(site.home / "runs" / "runs").glob("*/*")]:
        if path.is_file():
            told += path.read_text(errors="replace")
    assert not [name for name, value in PASSWORDS.items() if value in told]


def test_starting_again_changes_nothing(site: ComposeSite) -> None:
    site.start("deployments")
    said = Path(site.log("deployments")).read_text()
    assert "no difference, nothing changed" in said
