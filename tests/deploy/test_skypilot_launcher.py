"""The SkyPilot launcher with a command `sky` that keeps its manners and really runs the task."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.launchers import Launcher, State, skypilot
from deploy.launchers.skypilot import SkyPilotConfig, SkyPilotLauncher
from dpo_core.errors import RecipeError, StageFailed
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import curve, sft_job, wait_until
from tests.support.sites import sky_site, stand_in

Make = Callable[..., SkyPilotLauncher]
FULL: dict[str, Any] = {
    "bucket": "s3://team-dpo", "mount": "/ws", "nodes": 2, "gpus": 8, "cpus": 96, "memory_gib": 900,
    "hours": 12, "infra": "aws/us-east-1", "image": "registry/dpo:1", "spot": True, "max_hourly_cost": 90.5,
    "setup": "pip list", "environment": {"NCCL_SOCKET_IFNAME": "eth0"}, "secrets": ["HF_TOKEN"],
}  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    commands = sky_site.install(folder)
    monkeypatch.setenv("SKY_SITE", str(folder))
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    yield folder
    for job in sky_site.jobs(folder):
        (folder / f"cancel-{job['job_id']}").touch()
    over = lambda: all(job["status"] in sky_site.OVER for job in sky_site.jobs(folder))  # noqa: E731
    wait_until(over, "the end of all jobs")


@pytest.fixture
def make(site: Path, tmp_path: Path) -> Make:
    """Makes launchers, each as a new process would."""
    python = stand_in.write(tmp_path)

    def make(attempt: int = 1, **settings: Any) -> SkyPilotLauncher:
        given = {"python": python, "gpus": 0, "bucket": "s3://b", "mount": str(tmp_path), "restarts": 0}
        return SkyPilotLauncher(SkyPilotConfig.model_validate(given | settings), "my-run", attempt)

    return make


def until_over(launcher: Launcher, handle: str) -> State:
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    return launcher.poll(handle)


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


@pytest.mark.parametrize("what", ["done", "fail"])
def test_a_job_ends_as_its_files_say(make: Make, site: Path, tmp_path: Path, what: str) -> None:
    sky_site.site(site, reason="node 0 exited with 1")
    job = stand_in.job(tmp_path / "a folder", what)
    launcher = make(nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is (State.DONE if what == "done" else State.FAILED)
    assert "--nnodes=2 --nproc-per-node=1 --node-rank=" in launcher.logs(handle)
    assert launcher.why(handle) == ("" if what == "done" else "its command failed: node 0 exited with 1")
    launcher.cancel(handle)  # after the end: nothing to do
    log = (job.parent / "job.log").read_text()
    launcher.poll(handle)
    assert (job.parent / "job.log").read_text() == log, "the log is kept once"
    assert make(nodes=2).submit(job, 1, job.parent) == handle


def test_cancelled_jobs_save_and_leave_nothing(make: Make, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    launcher.cancel(handle, grace=10)
    assert launcher.poll(handle) is State.STOPPED
    assert not stand_in.alive(job.parent)


def test_a_job_does_not_bear_the_mark_of_its_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.assert_jobs_lack_the_mark(make(), tmp_path / "work", monkeypatch)


def test_a_preempted_machine_is_replaced(make: Make, site: Path, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make(spot=True)
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    sky_site.site(site, fate="RECOVERING")
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
    make: Make, site: Path, tmp_path: Path, fate: str, reason: str, words: str
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    sky_site.site(site, fate=fate, reason=reason)
    assert until_over(launcher, handle) is State.FAILED
    assert words in launcher.why(handle)


def test_submission_is_idempotent_even_when_its_answer_is_lost(
    make: Make, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a")
    sky_site.site(site, lost=True)
    job = stand_in.job(tmp_path / "work", "wait")
    first = make(secrets=["HF_TOKEN"]).submit(job, 1, job.parent)
    assert make().submit(job, 1, job.parent) == make().find(job.parent) == first
    assert len(sky_site.jobs(site)) == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "canary" in p.read_text(errors="replace")]
    assert make(attempt=2).find(job.parent) is None


def test_a_refused_job_says_why(make: Make, site: Path, tmp_path: Path) -> None:
    sky_site.site(site, refuse="ResourcesUnavailableError: Catalog does not contain any H100:9")
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(StageFailed, match="does not contain any H100:9"):
        make().submit(job, 1, job.parent)
    with pytest.raises(RecipeError, match="not in the bucket"):
        make(mount="/elsewhere").submit(job, 1, job.parent)


def test_a_server_that_is_away_for_a_while_changes_nothing(
    make: Make, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    sky_site.site(site, away=1)
    assert launcher.poll(handle) is State.RUNNING
    monkeypatch.setattr(skypilot, "AWAY", 0.5)
    sky_site.site(site, away=9)
    with pytest.raises(StageFailed, match="has not answered"):
        launcher.poll(handle)
    sky_site.site(site, away=0)


@pytest.mark.slow
def test_the_rendered_task_trains_on_two_nodes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real agent, ranks and trainer, one process a node."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    job = sft_job(tmp_path / "work", make_tiny_model(tmp_path / "model"))
    launcher = make(nodes=2, python=sys.executable)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    assert launcher.poll(handle) is State.DONE, launcher.logs(handle)
    assert len(curve(job.parent)) == 4
