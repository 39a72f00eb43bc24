"""The JobSet of a job on Kubernetes: valid by its project's model, safe, and named for good."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deploy.launchers.cluster import Handle, job_name
from deploy.launchers.kubernetes import KubernetesLauncher
from deploy.launchers.kubernetes_manifests import KubernetesConfig
from dpo_core.errors import RecipeError, StageFailed

JOB = Path("/ws/work/train-dpo/abc/job.json")
SMALL: dict[str, Any] = {"image": "registry/dpo:1", "claim": "workspace", "mount": "/ws"}
FULL: dict[str, Any] = SMALL | {
    "nodes": 4,
    "gpus": 8,
    "cpus": 96,
    "memory_gib": 800,
    "hours": 12,
    "queue": "gpu-queue",
    "priority": "research",
    "environment": {"NCCL_SOCKET_IFNAME": "eth0"},
    "secrets": {"HF_TOKEN": "hub/token"},
    "node_selector": {"gpu": "h100"},
    "service_account": "trainer",
    "pull_secret": "registry",
}


def jobset(settings: dict[str, Any], processes: int = 8) -> Any:
    return yaml.safe_load(KubernetesLauncher(KubernetesConfig(**settings), "my run").render(JOB, processes))


@pytest.mark.parametrize("settings", [SMALL, FULL])
def test_the_model_of_jobset_takes_every_field(settings: dict[str, Any]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")  # takes seconds
    # It drops fields that it does not know, so only equality shows a slip of the pen.
    made = jobset(settings)
    assert models.JobsetV1alpha2JobSet.from_dict(made).to_dict() == made


def test_a_jobset_says_what_runs_where() -> None:
    made = jobset(FULL)
    name = made["metadata"]["name"]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu-queue"
    assert made["metadata"]["annotations"]["dpo.io/run"] == "my run"
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    assert job["activeDeadlineSeconds"] == 12 * 3600
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == [
        *("python", "-m", "dpo_core.training.run_torchrun", "-m", "dpo_core.job", "--config", str(JOB)),
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "cpu": "96", "memory": "800Gi"}
    variables = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    assert variables["NCCL_SOCKET_IFNAME"] == "eth0"
    assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert variables["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    assert (variables["PET_NNODES"], variables["PET_NPROC_PER_NODE"]) == ("4", "8")


@pytest.mark.parametrize("run", ["my run", "train-dpo/ab_CD/" + "x" * 200, "Ünïcode", "日本", "9", "a.b"])
def test_names_are_labels_with_room_for_host_names(run: str) -> None:
    name = job_name(run, 999)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-999") <= 63
    assert name == job_name(run, 999) != job_name(run, 998)
    assert len({job_name(r, 1) for r in (run, run + ".", run.upper() + "!")}) == 3


def test_a_handle_is_read_back_whatever_the_folder_is_called() -> None:
    handle = Handle("dpo-1", Path("/a folder/work"))
    assert Handle.parse(str(handle)) == handle
    with pytest.raises(StageFailed, match="not a handle"):
        Handle.parse("4711")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"environment": {"HF_TOKEN": "hf_abc"}}, "looks like a secret"),
        ({"secrets": {"HF_TOKEN": "hub"}}, "write SECRET/KEY"),
        ({"mount": "ws"}, "absolute"),
        ({"gpu": 8}, "gpu"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        KubernetesConfig(**(SMALL | setting))


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(RecipeError, match="processes is 8, but the nodes have gpus=4"):
        jobset(SMALL | {"gpus": 4})
