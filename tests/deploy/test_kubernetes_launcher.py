"""What the Kubernetes launcher says of refused, lost, waiting and deleted jobs, against a small cluster."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the extra kubernetes is not installed")
pytest.importorskip("kubeflow_trainer_api", reason="kubeflow-trainer-api is not installed")

from deploy.launchers import State
from dpo_core.errors import StageFailed
from tests.support.runs.training_jobs import wait_until
from tests.support.sites import stand_in
from tests.support.sites.cluster_sites import Kubernetes, until_over


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    site = Kubernetes(tmp_path, monkeypatch)
    yield site
    site.close()


def test_a_failed_pod_is_started_again(site: Kubernetes, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "second time")
    launcher = site.make(restarts=1)
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is State.DONE
    assert len(stand_in.starts(job.parent)) == 2
    assert launcher.why(handle) == ""


def test_other_settings_are_no_rejoining(site: Kubernetes, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    site.make().submit(job, 1, job.parent)
    with pytest.raises(StageFailed, match="exists and belongs to another run"):
        site.make(image="dpo:2").submit(job, 1, job.parent)


@pytest.mark.parametrize("fault", ["500", "429", "slow", "lost"])
def test_every_request_is_repeated(site: Kubernetes, tmp_path: Path, fault: str) -> None:
    job = stand_in.job(tmp_path / "work", "done")
    site.cluster.faults = [("POST", fault), ("GET", fault), ("POST", fault), ("GET", fault)]
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is State.DONE
    assert not site.cluster.faults
    assert len(stand_in.starts(job.parent)) == 1


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda c: setattr(c, "installed", False), "404.*Install JobSet"),
        (lambda c: c.faults.append(("POST", "403")), "refused the request .403.*administrator"),
    ],
)
def test_a_refused_job_says_what_to_do(
    site: Kubernetes, tmp_path: Path, prepare: Callable[[Any], None], words: str
) -> None:
    prepare(site.cluster)
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(StageFailed) as raised:
        site.make().submit(job, 1, job.parent)
    assert re.search(words, str(raised.value))


def disrupted(reason: str, message: str) -> dict[str, Any]:
    holds = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
    return {"conditions": [holds]}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"reason": "Evicted", "message": "low on resource: memory"}, "evicted by its node .low on resource"),
        (disrupted("EvictionByEvictionAPI", "Eviction API: evicting"), "evicted: its node is drained"),
        (disrupted("DeletionByTaintManager", "Taint manager: deleting"), "its node was lost"),
        (disrupted("PreemptionByScheduler", "preempting"), "preempted by a pod of higher priority"),
        (
            {"containerStatuses": [{"name": "node", "state": {"terminated": {"reason": "OOMKilled"}}}]},
            "out of memory",
        ),
    ],
)
def test_a_lost_pod_says_why(site: Kubernetes, tmp_path: Path, status: dict[str, Any], words: str) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make(nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "two nodes")
    # The other rank only misses the lost one; its own failure must not hide the reason.
    other = {"containerStatuses": [{"name": "node", "state": {"terminated": {"exitCode": 1}}}]}
    with site.cluster.lock:
        first, second = sorted(site.cluster.pods)
        site.cluster.lose(first, other)
        site.cluster.lose(second, status)
    assert until_over(launcher, handle) is State.FAILED
    assert re.search(words, launcher.why(handle))
    launcher.cancel(handle, grace=1)
    assert f"kubernetes: {launcher.why(handle)}" in site.make().logs(handle), (
        "a new watcher reads it in the log"
    )


@pytest.mark.parametrize(
    ("status", "at_once", "words"),
    [
        ({"reason": "InvalidImageName", "message": "couldn't parse"}, True, "not pulled: InvalidImageName"),
        ({"reason": "ImagePullBackOff", "message": "Back-off"}, False, "not pulled: ImagePullBackOff"),
        ({"reason": "CreateContainerConfigError", "message": "no secret x"}, False, "no secret x"),
    ],
)
def test_pods_that_cannot_start_fail_the_job(
    site: Kubernetes, tmp_path: Path, status: dict[str, Any], at_once: bool, words: str
) -> None:
    waiting = [{"name": "node", "state": {"waiting": status}}]
    site.cluster.pending = {"phase": "Pending", "containerStatuses": waiting}
    job = stand_in.job(tmp_path / "work", "done")
    launcher = site.make(start_minutes=60 if at_once else 0.01)
    handle = launcher.submit(job, 1, job.parent)
    if not at_once:
        assert launcher.poll(handle) is State.RUNNING
    assert until_over(launcher, handle) is State.FAILED
    assert words in launcher.why(handle)
    launcher.cancel(handle, grace=1)
    assert not site.cluster.objects


def test_a_job_without_quota_for_pods_waits_and_says_so(site: Kubernetes, tmp_path: Path) -> None:
    site.cluster.quota = "exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, limited: 0"
    job = stand_in.job(tmp_path / "work", "done")
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: "quota exceeded" in launcher.why(handle), "the event")
    assert launcher.poll(handle) is State.RUNNING
    site.cluster.quota = None
    assert until_over(launcher, handle) is State.DONE


def test_a_job_in_the_queue_waits_and_one_that_is_preempted_goes_on(site: Kubernetes, tmp_path: Path) -> None:
    site.cluster.admits = False
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make(queue="gpu-queue", start_minutes=0.001)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: "waiting in queue gpu-queue: couldn't assign" in launcher.why(handle), "the queue")
    assert launcher.poll(handle) is State.RUNNING, "time in the queue is no time without a start"
    launcher.config = launcher.config.model_copy(update={"start_minutes": 1})
    site.cluster.admits = True
    wait_until((job.parent / "ready").exists, "a node")

    site.cluster.admits = False  # Kueue takes the room back: the pods save and end
    wait_until(lambda: (job.parent / "stopped").exists() and not site.cluster.pods, "the end of the pods")
    assert launcher.poll(handle) is State.RUNNING, "a stop by the queue is not the end"
    site.cluster.admits = True
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "the second start")
    launcher.cancel(handle, grace=5)


def test_a_job_that_somebody_deletes_has_failed(site: Kubernetes, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "stubborn")
    launcher = site.make(grace_seconds=5)
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    with site.cluster.lock:
        site.cluster.delete(launcher.name)
        site.cluster.end_pods(launcher.name, 0)
    assert until_over(launcher, handle) is State.FAILED
    assert "deleted" in launcher.why(handle)
