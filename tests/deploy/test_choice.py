"""Which launcher a flow gets, and how a flow that begins again treats the job that it finds."""

import threading
from pathlib import Path

import pytest

from deploy.launchers import Cluster, LocalLauncher, State, launcher_of
from deploy.launchers.registry import TARGETS, RejoiningLauncher
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from tests.deploy.test_slurm_launcher import Make, make, site  # noqa: F401
from tests.support.runs.training_jobs import wait_until
from tests.support.sites import slurm_site, stand_in


def test_jobs_run_here_without_a_cluster() -> None:
    assert isinstance(launcher_of(None, "a run", threading.Event()), LocalLauncher)
    cluster = Cluster(on="slurm", settings=SlurmConfig(partition="gpu"))
    launcher = launcher_of(cluster, "a run", threading.Event())
    assert "--partition=gpu" in launcher.render(Path("/ws/job.json"), 8)


def test_a_cluster_is_a_parameter_of_a_flow() -> None:
    """Prefect keeps parameters as JSON, and shows them."""
    cluster = Cluster(on="slurm", settings=SlurmConfig(partition="gpu", nodes=2))
    again = Cluster.model_validate_json(cluster.model_dump_json())
    assert again == cluster
    assert isinstance(again.settings, SlurmConfig)


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


@pytest.fixture
def begin(make: Make):  # noqa: F811
    """A flow that begins, or begins again: nothing is left of the one before but the work folder."""
    settings = make().config

    return lambda: RejoiningLauncher(lambda attempt: SlurmLauncher(settings, "a run", attempt))


def test_a_flow_that_begins_again_rejoins_a_running_job(begin, site: Path, tmp_path: Path) -> None:  # noqa: F811
    job = stand_in.job(tmp_path / "work", "wait")
    first = begin().submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    again = begin()
    assert again.submit(job, 1, job.parent) == first
    assert again.poll(first) is State.RUNNING
    again.cancel(first, grace=10)
    assert len(slurm_site.jobs(site)) == 1


@pytest.mark.parametrize("what", ["fail", "wait"])
def test_after_a_job_that_failed_or_was_stopped_comes_the_next_attempt(
    begin,
    site: Path,  # noqa: F811
    tmp_path: Path,
    what: str,
) -> None:
    job = stand_in.job(tmp_path / "work", what)
    flow = begin()
    first = flow.submit(job, 1, job.parent)
    if what == "wait":
        wait_until((job.parent / "ready").exists, "a node")
        flow.cancel(first, grace=10)
    wait_until(lambda: flow.poll(first) is not State.RUNNING, "the end")
    stand_in.job(tmp_path / "work", "done")
    again = begin()
    second = again.submit(job, 1, job.parent)
    assert second != first
    wait_until(lambda: again.poll(second) is not State.RUNNING, "the end")
    assert again.poll(second) is State.DONE
    # What is done stays done, and is not run again.
    assert begin().submit(job, 1, job.parent) == second
    assert len(slurm_site.jobs(site)) == 2
