"""What the launchers of all clusters promise, against stand-ins that really run the rendered commands."""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("kubernetes", reason="the extra kubernetes is not installed")
pytest.importorskip("kubeflow_trainer_api", reason="kubeflow-trainer-api is not installed")

from deploy.launchers import Cluster, LocalLauncher, State, cluster, launcher_of
from deploy.launchers.registry import TARGETS
from deploy.launchers.slurm import SlurmConfig
from dpo_core.errors import RecipeError, StageFailed
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import curve, sft_job, wait_until
from tests.support.sites import stand_in
from tests.support.sites.cluster_sites import SITES, Site, Slurm, until_over


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = SITES[request.param](tmp_path, monkeypatch)
    yield site
    site.close()


@pytest.mark.parametrize("what", ["done", "fail"])
def test_a_job_ends_as_its_files_say_and_its_log_stays(site: Site, tmp_path: Path, what: str) -> None:
    job = stand_in.job(tmp_path / "a 100% folder", what)
    (job.parent / "error.json").write_text("{}")  # of an earlier job
    launcher = site.make(nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is (State.DONE if what == "done" else State.FAILED)
    if what == "done":  # the first failure ends the other node, which may not have started yet
        wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "both nodes")
    assert ("its command" in launcher.why(handle)) is (what == "fail")
    launcher.cancel(handle, grace=1)  # after the end: nothing to stop
    log = launcher.logs(handle)
    assert "-m dpo_core.training.run_torchrun" in log
    assert ("the last words of a rank" in log) is (what == "fail")
    assert site.make(nodes=2).logs(handle) == log


def test_cancelled_jobs_save_and_leave_nothing(site: Site, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make(nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2 and (job.parent / "ready").exists(), "two nodes")
    launcher.cancel(handle, grace=10)
    assert launcher.poll(handle) is State.STOPPED
    assert not stand_in.alive(job.parent)
    launcher.cancel(handle)  # once more: nothing to do


def test_stubborn_jobs_are_killed_after_the_grace_time(site: Site, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "stubborn")
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    launcher.cancel(handle, grace=1)
    assert not stand_in.alive(job.parent)
    assert launcher.poll(handle) is State.FAILED


def test_flows_that_begin_again_at_the_same_moment_rejoin_one_job(site: Site, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    handles: list[str] = []
    launchers = [site.make() for _ in range(3)]
    threads = [
        threading.Thread(target=lambda one=one: handles.append(one.submit(job, 1, job.parent)))
        for one in launchers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 3
    assert site.submitted() == len(set(handles)) == 1
    wait_until((job.parent / "ready").exists, "a node")
    again = site.make()
    for record in job.parent.glob("*.handle"):
        record.unlink()  # the flow died before it could write it down
    assert again.find(job.parent) == handles[0]
    assert again.poll(handles[0]) is State.RUNNING
    again.cancel(handles[0], grace=10)
    assert site.make("another run").find(job.parent) is None


def test_after_a_job_that_failed_or_was_stopped_comes_the_next_attempt(site: Site, tmp_path: Path) -> None:
    for what in ("fail", "wait", "done"):
        job = stand_in.job(tmp_path / "work", what)
        launcher = site.make()
        handle = launcher.submit(job, 1, job.parent)
        if what == "wait":
            wait_until((job.parent / "ready").exists, "a node")
            launcher.cancel(handle, grace=10)
        assert (until_over(launcher, handle) is State.DONE) is (what == "done")
    # What is done stays done, and is not run again.
    assert site.make().submit(job, 1, job.parent) == handle
    assert site.submitted() == 3


def test_a_job_whose_acceptance_was_lost_is_found(site: Site, tmp_path: Path) -> None:
    site.lose_answer()
    job = stand_in.job(tmp_path / "work", "wait")
    handle = site.make().submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    assert site.make().poll(handle) is State.RUNNING
    assert len(stand_in.starts(job.parent)) == 1


def test_a_cluster_that_is_away_for_a_while_changes_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    site.away(2)
    assert launcher.poll(handle) is State.RUNNING
    monkeypatch.setattr(cluster, "AWAY", 1.0)
    site.away(99)
    with pytest.raises(StageFailed, match="has not answered"):
        launcher.poll(handle)
    site.away(0)
    assert site.make().poll(handle) is State.RUNNING


def test_a_refused_job_says_why_and_can_be_submitted_again(site: Site, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "done")
    site.refuse("exceeded quota: accounting/QOS policy")
    with pytest.raises(StageFailed, match=r"exceeded quota: accounting/QOS policy"):
        site.make().submit(job, 1, job.parent)
    site.refuse("")
    launcher = site.make()
    assert until_over(launcher, launcher.submit(job, 1, job.parent)) is State.DONE


@pytest.mark.parametrize("site", ["kubernetes", "skypilot"], indirect=True)
def test_a_folder_that_the_nodes_do_not_see_is_refused(site: Site, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(RecipeError, match=r"is not (on the volume|in the bucket) that the"):
        site.make(mount="/elsewhere").submit(job, 1, job.parent)


@pytest.mark.parametrize(
    ("site", "words"), [("slurm", "login node"), ("skypilot", "put sky on PATH")], indirect=["site"]
)
def test_a_machine_without_the_command_says_so(
    site: Site, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match=words):
        site.make().require_client()
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(RecipeError, match=words):
        site.make().submit(job, 1, job.parent)


@pytest.mark.slow
def test_the_rendered_command_trains_on_two_nodes(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real agent, ranks and trainer, one process a node; on SLURM cut short in the middle first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TEST_MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    epochs = 30 if isinstance(site, Slurm) else 1
    job = sft_job(tmp_path / "work", make_tiny_model(tmp_path / "model"), epochs=epochs)
    launcher = site.make(nodes=2, python=sys.executable)
    handle = launcher.submit(job, 1, job.parent)
    if isinstance(site, Slurm):
        wait_until(lambda: len(curve(job.parent)) > 3, "some steps")
        launcher.cancel(handle, grace=60)
        assert launcher.poll(handle) is State.STOPPED, launcher.logs(handle)
        launcher = site.make(nodes=2, python=sys.executable)
        handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is State.DONE, launcher.logs(handle)
    assert len(curve(job.parent)) == 4 * epochs
    assert (job.parent / "out" / "model.safetensors").exists()


# --- the choice of a launcher -----------------------------------------------------------------------------


def test_a_cluster_is_a_parameter_of_a_flow_and_chooses_the_launcher() -> None:
    """Prefect keeps parameters as JSON, and shows them."""
    assert isinstance(launcher_of(None, "a run", threading.Event()), LocalLauncher)
    chosen = Cluster(on="slurm", settings=SlurmConfig(partition="gpu", nodes=2))
    again = Cluster.model_validate_json(chosen.model_dump_json())
    assert again == chosen
    assert isinstance(again.settings, SlurmConfig)
    launcher = launcher_of(again, "a run", threading.Event())
    assert "--partition=gpu" in launcher.render(Path("/ws/job.json"), 8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"on": "moon", "settings": {}}, "no cluster 'moon'; choose one of kubernetes, slurm, skypilot"),
        ({"on": "slurm", "settings": {"a": 1}}, "Extra inputs are not permitted"),
        ({"on": "slurm"}, "valid dictionary or instance of SlurmConfig"),
        ("slurm", "valid dictionary"),
    ],
)
def test_a_cluster_that_is_none_is_refused(values: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cluster.model_validate(values)


def test_every_setting_of_every_cluster_says_what_it_is() -> None:
    for config, _ in TARGETS.values():
        assert not [name for name, field in config.model_fields.items() if not field.description]
