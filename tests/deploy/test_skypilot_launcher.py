"""The SkyPilot launcher with a command `sky` that keeps its manners and really runs the task."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.launchers import State
from deploy.launchers.skypilot import SkyPilotConfig, SkyPilotLauncher
from tests.support.runs.training_jobs import wait_until
from tests.support.sites import sky_site, stand_in
from tests.support.sites.cluster_sites import Sky, until_over

FULL: dict[str, Any] = {
    "bucket": "s3://team-dpo", "mount": "/ws", "nodes": 2, "gpus": 8, "cpus": 96, "memory_gib": 900,
    "hours": 12, "infra": "aws/us-east-1", "image": "registry/dpo:1", "spot": True, "max_hourly_cost": 90.5,
    "setup": "pip list", "environment": {"NCCL_SOCKET_IFNAME": "eth0"}, "secrets": ["HF_TOKEN"],
}  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sky]:
    site = Sky(tmp_path, monkeypatch)
    yield site
    site.close()


def test_the_task_says_what_is_asked_for_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a")
    text = SkyPilotLauncher(SkyPilotConfig(**FULL), "my run").render(Path("/ws/work/job.json"), 8)
    task = yaml.safe_load(text)
    assert task["resources"] == {
        "infra": "aws/us-east-1",
        "accelerators": "H100:8",
        "cpus": "96+",
        "memory": "900+",
        "use_spot": True,
        "max_hourly_cost": 90.5,
        "image_id": "docker:registry/dpo:1",
        "job_recovery": {"max_restarts_on_errors": 3},
    }
    assert task["file_mounts"] == {"/ws": {"source": "s3://team-dpo", "mode": "MOUNT_CACHED"}}
    assert "canary" not in text
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0


def test_skypilots_own_schema_takes_the_task() -> None:
    """SkyPilot cannot live beside this project's packages: $SKY_PYTHON names a python that has it."""
    python = os.environ.get("SKY_PYTHON")
    if not python:
        pytest.skip("SKY_PYTHON does not name a python with skypilot")
    check = (
        "import sys, yaml, jsonschema; from sky.utils import schemas; from sky import Task\n"
        "task = yaml.safe_load(sys.stdin)\n"
        "jsonschema.Draft202012Validator(schemas.get_task_schema()).validate(task)\n"
        "for resources in [task['resources']]:\n"
        "    jsonschema.Draft202012Validator(schemas.get_resources_schema()).validate(resources)\n"
        "for storage in task['file_mounts'].values():\n"
        "    jsonschema.Draft202012Validator(schemas.get_storage_schema()).validate(storage)\n"
    )
    for settings in (FULL, {"bucket": "gs://b", "mount": "/ws", "gpus": 0}):
        text = SkyPilotLauncher(SkyPilotConfig(**settings), "my run").render(Path("/ws/job.json"), 8)
        done = subprocess.run(
            [python, "-c", check], input=text, text=True, capture_output=True, check=False, cwd="/"
        )
        assert done.returncode == 0, done.stderr


def test_a_preempted_machine_is_replaced(site: Sky, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make(spot=True)
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    sky_site.site(site.folder, fate="RECOVERING")
    wait_until(lambda: "preempted or lost" in launcher.why(handle), "the loss")
    assert launcher.poll(handle) is State.RUNNING
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "the second start")


@pytest.mark.parametrize(
    ("fate", "reason", "words"),
    [
        ("FAILED_NO_RESOURCE", "VcpuLimitExceeded in us-east-1", "room or quota for it: VcpuLimitExceeded"),
        ("FAILED_SETUP", "pip failed", "its setup failed: pip failed"),
    ],
)
def test_a_job_that_skypilot_ends_says_why(
    site: Sky, tmp_path: Path, fate: str, reason: str, words: str
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    sky_site.site(site.folder, fate=fate, reason=reason)
    assert until_over(launcher, handle) is State.FAILED
    assert words in launcher.why(handle)


def test_the_log_is_kept_once_and_secrets_are_passed_by_name(
    site: Sky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a")
    job = stand_in.job(tmp_path / "work", "done")
    launcher = site.make(secrets=["HF_TOKEN"])
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is State.DONE
    log = (job.parent / "job.log").read_text()
    launcher.poll(handle)
    assert (job.parent / "job.log").read_text() == log
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "canary" in p.read_text(errors="replace")]
