"""A Prefect worker without PyTorch and with 1 GB of memory runs an alignment whose jobs run elsewhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.scenarios.faults.memory import Room, room
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tiny_run import tiny_recipe
from tests.support.sites import slurm_site
from tests.support.sites.prefect_site import REPO, Site

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the plain package: what a worker installs."""
    folder = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", REPO / "constraints.txt"]
    done = subprocess.run([*install, "--editable", REPO], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the plain package cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    for package in ("torch", "transformers", "deepspeed"):
        assert subprocess.run(
            [python, "-c", f"import {package}"], capture_output=True, check=False
        ).returncode
    return python


@pytest.fixture
def gigabyte() -> Iterator[Room]:
    with room() as made:
        if isinstance(made, str):
            pytest.skip(made)
        made.limit(1000)
        yield made


def test_a_worker_without_torch_runs_a_deployed_alignment(
    plain: Path, gigabyte: Room, tmp_path: Path
) -> None:
    site = Site(tmp_path)
    recipe = site.home / "aligned.yaml"
    model = make_tiny_model(tmp_path / "taught", taught=True)
    recipe.write_text(yaml.safe_dump(tiny_recipe(model, site.home / "runs")))
    cluster = site.home / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"gpus": 0, "python": sys.executable}))
    shipped = yaml.safe_load((REPO / "deploy" / "prefect.yaml").read_text())
    nightly = shipped["deployments"][0]
    nightly["parameters"] = {"recipe": str(recipe), "on": "slurm", "settings": str(cluster)}
    nightly["work_pool"]["job_variables"]["env"]["PYTHONPATH"] = str(REPO)
    nightly["schedules"] = []
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump({"pull": [], "deployments": [nightly]}))
    commands = slurm_site.install(tmp_path / "slurm")
    environment = {
        "SLURM_SITE": str(tmp_path / "slurm"),
        # The cluster's machines are not the worker's.
        "SLURM_SITE_GROUP": str(gigabyte.folder.parent),
        "PATH": os.pathsep.join([str(commands), str(plain.parent), os.environ["PATH"]]),
    }
    try:
        site.serve()
        site.ask("/work_pools/", {"name": "dpo", "type": "process"})
        site.dpo("deploy", "--file", str(file))
        site.python = str(plain)
        gigabyte.takes(site.worker(**environment).pid)
        deployment = site.ask("/deployments/name/dpo/nightly")
        site.ask(f"/deployments/{deployment['id']}/create_flow_run", {})
        run = site.ended("nightly", patience=1500)
    finally:
        site.close()
    assert run["state_name"] == "Completed", run["state"]["message"]
    jobs = slurm_site.jobs(tmp_path / "slurm")
    assert {job["state"] for job in jobs} == {"COMPLETED"}
    assert len(jobs) == 9, "import, two gates, SFT, pairs, log-probs, DPO, PPO, evaluation"
    (page,) = (site.home / "runs" / "runs").glob("*/page.html")
    assert "PPO" in page.read_text()
    print(f"peak of the worker and its flow: {gigabyte.peak() / 1e6:.0f} MB")
