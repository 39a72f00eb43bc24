"""Which launcher a flow gets, and how a flow that begins again treats the job that it finds."""

import json
from pathlib import Path

import pytest

from deploy.launchers import LocalLauncher, State, chosen
from deploy.launchers.registry import TARGETS, VARIABLE, Rejoining
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from dpo_core.errors import RecipeError
from tests.deploy.test_slurm_launcher import Make, make, site  # noqa: F401
from tests.support.runs.training_jobs import wait_until
from tests.support.sites import slurm_site, stand_in


def test_jobs_run_here_unless_the_environment_names_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert isinstance(chosen("a run"), LocalLauncher)
    settings = SlurmConfig(partition="gpu").model_dump(mode="json")
    monkeypatch.setenv(VARIABLE, json.dumps({"on": "slurm", "settings": settings}))
    assert "--partition=gpu" in chosen("a run").render(Path("/ws/job.json"), 8)


@pytest.mark.parametrize(
    "said", ["slurm", "[]", '{"on": "moon", "settings": {}}', '{"on": "slurm", "settings": {"a": 1}}']
)
def test_a_variable_that_is_not_ours_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(VARIABLE, said)
    with pytest.raises(RecipeError, match=VARIABLE):
        chosen("a run")


def test_every_setting_of_every_cluster_says_what_it_is() -> None:
    for config, _ in TARGETS.values():
        assert not [name for name, field in config.model_fields.items() if not field.description]


@pytest.fixture
def begin(make: Make):  # noqa: F811
    """A flow that begins, or begins again: nothing is left of the one before but the work folder."""
    settings = make().config

    return lambda: Rejoining(lambda attempt: SlurmLauncher(settings, "a run", attempt))


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
