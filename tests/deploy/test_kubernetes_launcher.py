"""The Kubernetes launcher against a small cluster whose kubelet runs the rendered commands."""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the extra kubernetes is not installed")
pytest.importorskip("kubeflow_trainer_api", reason="kubeflow-trainer-api is not installed")

from deploy.launchers import Launcher, State
from deploy.launchers import kubernetes as launcher_module
from deploy.launchers import kubernetes_api as kube_api
from deploy.launchers.kubernetes import KubernetesLauncher
from deploy.launchers.kubernetes_api import KubeApi
from deploy.launchers.kubernetes_manifests import KubernetesConfig
from dpo_core.errors import RecipeError, StageFailed
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import curve, sft_job, wait_until
from tests.support.sites import stand_in
from tests.support.sites.kube_server import Cluster, Server

Make = Callable[..., KubernetesLauncher]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cluster(server: Server) -> Cluster:
    return server.cluster


@pytest.fixture
def make(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes launchers, each as a new process would: with a kubeconfig and nothing else."""
    monkeypatch.setenv("KUBECONFIG", str(server.write_config(tmp_path / "kubeconfig")))
    monkeypatch.setattr(kube_api, "TIMEOUT", 0.5)
    monkeypatch.setattr(launcher_module, "_AFTER_GRACE", 1.0)
    python = stand_in.write(tmp_path)

    def make(attempt: int = 1, away_seconds: float = 20.0, **settings: Any) -> KubernetesLauncher:
        given = {"image": "dpo:1", "claim": "ws", "mount": str(tmp_path), "python": python, "gpus": 0}
        made = KubernetesConfig.model_validate(given | {"restarts": 0} | settings)
        return KubernetesLauncher(made, "my-run", attempt, KubeApi("default", away_seconds=away_seconds))

    return make


def until_over(launcher: Launcher, handle: str) -> State:
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    return launcher.poll(handle)


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
@pytest.mark.parametrize("what", ["done", "fail"])
def test_a_job_ends_as_its_files_say(make: Make, tmp_path: Path, kind: str, what: str) -> None:
    job = stand_in.job(tmp_path / "a folder", what)
    (job.parent / "error.json").write_text("{}")  # of an earlier job
    launcher = make(kind=kind, nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is (State.DONE if what == "done" else State.FAILED)
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "both nodes")
    if what == "fail":
        assert "its command ended with status 1" in launcher.why(handle)
        wait_until(lambda: "the last words of a rank" in launcher.logs(handle), "the log of rank 0")
    # The log outlives the pods.
    launcher.cancel(handle, grace=1)
    assert "node 0 -m dpo_core.training.run_torchrun" in launcher.logs(handle)
    assert launcher.logs(handle) == make(kind=kind, nodes=2).logs(handle)


def test_cancelled_jobs_save_and_leave_nothing(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make(nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2 and (job.parent / "ready").exists(), "two nodes")
    launcher.cancel(handle, grace=10)
    assert launcher.poll(handle) is State.STOPPED
    assert not cluster.pods
    assert not stand_in.alive(job.parent)
    launcher.cancel(handle)  # once more: nothing to do


def test_stubborn_jobs_are_killed_after_the_grace_time(make: Make, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "stubborn")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    launcher.cancel(handle, grace=1)  # although the pod's own grace is two minutes
    assert not stand_in.alive(job.parent)
    assert launcher.poll(handle) is State.FAILED


def test_a_failed_pod_is_started_again(make: Make, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "second time")
    launcher = make(restarts=1)
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is State.DONE
    assert len(stand_in.starts(job.parent)) == 2
    assert launcher.why(handle) == ""


def test_submitting_again_finds_the_job_even_at_the_same_moment(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    handles: list[str] = []
    launchers = [make() for _ in range(4)]
    threads = [
        threading.Thread(target=lambda one=one: handles.append(one.submit(job, 1, job.parent)))
        for one in launchers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 4
    assert len(set(handles)) == 1
    assert sum(plural == "trainjobs" for plural, _ in cluster.objects) == 1
    wait_until((job.parent / "ready").exists, "a node")

    found = make()  # a watcher that knows the run and the attempt only
    handle = found.find(job.parent)
    assert handle == handles[0]
    assert found.poll(handle) is State.RUNNING
    found.cancel(handle, grace=5)
    assert make().poll(handles[0]) is State.STOPPED
    assert make().find(job.parent) is None


def test_another_attempt_is_another_job_and_other_settings_are_no_rejoining(
    make: Make, tmp_path: Path
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    first = make().submit(job, 1, job.parent)
    with pytest.raises(StageFailed, match="exists and belongs to another run"):
        make(image="dpo:2").submit(job, 1, job.parent)
    second = make(attempt=2).submit(job, 1, job.parent)
    assert second != first
    for handle in (first, second):
        make().cancel(handle, grace=1)


@pytest.mark.parametrize("fault", ["500", "503", "429", "slow", "lost"])
def test_a_server_that_is_slow_or_away_for_a_while_changes_nothing(
    make: Make, cluster: Cluster, tmp_path: Path, fault: str
) -> None:
    job = stand_in.job(tmp_path / "work", "done")
    cluster.faults = [("POST", fault), ("GET", fault), ("POST", fault), ("GET", fault)]
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is State.DONE
    assert not cluster.faults
    assert len(stand_in.starts(job.parent)) == 1


def test_a_server_that_stays_away_is_an_error_and_the_job_goes_on(
    make: Make, server: Server, tmp_path: Path
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make(away_seconds=0.5)
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    server.cluster.faults = [("GET", "503")] * 9
    with pytest.raises(StageFailed, match="has not answered for"):
        launcher.poll(handle)
    server.cluster.faults = []
    assert make().poll(handle) is State.RUNNING


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda c: setattr(c, "quota", "object:exceeded quota: jobs"), "quota exceeded: .*jobs"),
        (lambda c: c.kinds.discard("trainjobs"), "404.*choose kind=jobset"),
        (lambda c: c.faults.append(("POST", "403")), "refused the request .403.*administrator"),
    ],
)
def test_a_refused_job_says_why(
    make: Make, cluster: Cluster, tmp_path: Path, prepare: Callable[[Cluster], None], words: str
) -> None:
    prepare(cluster)
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(StageFailed) as raised:
        make().submit(job, 1, job.parent)
    assert re.search(words, str(raised.value))


def test_an_unknown_runtime_is_refused(make: Make, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(StageFailed, match="admission webhook denied"):
        make(runtime="no-such").submit(job, 1, job.parent)


def test_a_job_off_the_volume_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not on the volume"):
        make(mount="/elsewhere").submit(stand_in.job(tmp_path / "w", "done"), 1, tmp_path / "w")


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
def test_a_lost_pod_says_why(
    make: Make, cluster: Cluster, tmp_path: Path, status: dict[str, Any], words: str
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make(nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "two nodes")
    # The other rank only misses the lost one; its own failure must not hide the reason.
    other = {"containerStatuses": [{"name": "node", "state": {"terminated": {"exitCode": 1}}}]}
    with cluster.lock:
        first, second = sorted(cluster.pods)
        cluster.lose(first, other)
        cluster.lose(second, status)
    assert until_over(launcher, handle) is State.FAILED
    assert re.search(words, launcher.why(handle))
    launcher.cancel(handle, grace=1)
    assert f"kubernetes: {launcher.why(handle)}" in make().logs(handle), "a new watcher reads it in the log"


@pytest.mark.parametrize(
    ("status", "at_once", "words"),
    [
        ({"reason": "InvalidImageName", "message": "couldn't parse"}, True, "not pulled: InvalidImageName"),
        ({"reason": "ImagePullBackOff", "message": "Back-off"}, False, "not pulled: ImagePullBackOff"),
        ({"reason": "CreateContainerConfigError", "message": "no secret x"}, False, "no secret x"),
    ],
)
def test_pods_that_cannot_start_fail_the_job(
    make: Make, cluster: Cluster, tmp_path: Path, status: dict[str, Any], at_once: bool, words: str
) -> None:
    waiting = [{"name": "node", "state": {"waiting": status}}]
    cluster.pending = {"phase": "Pending", "containerStatuses": waiting}
    job = stand_in.job(tmp_path / "work", "done")
    launcher = make(start_minutes=60 if at_once else 0.01)
    handle = launcher.submit(job, 1, job.parent)
    if not at_once:
        assert launcher.poll(handle) is State.RUNNING
    assert until_over(launcher, handle) is State.FAILED
    assert words in launcher.why(handle)
    launcher.cancel(handle, grace=1)
    assert not [name for plural, name in cluster.objects if plural == "trainjobs"]


def test_a_job_without_quota_for_pods_waits_and_says_so(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    cluster.quota = "exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, limited: 0"
    job = stand_in.job(tmp_path / "work", "done")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: "quota exceeded" in launcher.why(handle), "the event")
    assert launcher.poll(handle) is State.RUNNING
    cluster.quota = None
    assert until_over(launcher, handle) is State.DONE


def test_a_job_in_the_queue_waits_and_one_that_is_preempted_goes_on(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.admits = False
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make(queue="gpu-queue", start_minutes=0.001)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: "waiting in queue gpu-queue: couldn't assign" in launcher.why(handle), "the queue")
    assert launcher.poll(handle) is State.RUNNING, "time in the queue is no time without a start"
    launcher.config = launcher.config.model_copy(update={"start_minutes": 1})
    cluster.admits = True
    wait_until((job.parent / "ready").exists, "a node")

    cluster.admits = False  # Kueue takes the room back: the pods save and end
    wait_until(lambda: (job.parent / "stopped").exists() and not cluster.pods, "the end of the pods")
    assert launcher.poll(handle) is State.RUNNING, "a stop by the queue is not the end"
    cluster.admits = True
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "the second start")
    launcher.cancel(handle, grace=5)


def test_a_job_that_somebody_deletes_has_failed(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "stubborn")
    launcher = make(grace_seconds=5)
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    with cluster.lock:
        cluster.delete("trainjobs", launcher.name)
        cluster.end_pods(launcher.name, 0)
    assert until_over(launcher, handle) is State.FAILED
    assert "deleted" in launcher.why(handle)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_the_rendered_command_trains_on_two_nodes(
    make: Make, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The real agent, ranks and trainer, one process a pod."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TEST_MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    model = make_tiny_model(tmp_path / "model")
    job = sft_job(tmp_path / "work", model)
    launcher = make(kind=kind, nodes=2, python=sys.executable)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    assert launcher.poll(handle) is State.DONE, launcher.logs(handle)
    assert len(curve(job.parent)) == 4
    assert (job.parent / "out" / "model.safetensors").exists()
    launcher.cancel(handle, grace=1)
