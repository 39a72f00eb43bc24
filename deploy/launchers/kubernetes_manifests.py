"""Builds the Kubernetes objects of a job: a TrainJob and its runtime, or a JobSet.

Fields as in kubeflow trainer 2.3 (`trainer.kubeflow.org/v1alpha1`) and JobSet 0.12
(`jobset.x-k8s.io/v1alpha2`). torchrun is process 1 of every pod, so that the kubelet's SIGTERM reaches it. It
reads its node rank from `PET_*` variables, which the Trainer sets itself and refuses in a TrainJob.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator

from deploy.launchers import torchrun
from deploy.launchers.cluster import ClusterConfig

Manifest = dict[str, Any]

TRAINER = ("trainer.kubeflow.org", "v1alpha1")
JOBSET = ("jobset.x-k8s.io", "v1alpha2")
RUN, ATTEMPT, DIGEST = "dpo.io/run", "dpo.io/attempt", "dpo.io/digest"
PORT = 29500
NODE = "node"
"""Name of the replicated job and of its container; the Trainer requires this name."""


class KubernetesConfig(ClusterConfig):
    """Settings of jobs on Kubernetes."""

    image: str
    """Image with this package; it runs as a user other than root."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) that holds the workspace."""
    mount: str
    """Path at which the claim is mounted, in the pods and on the flow's machine."""
    namespace: str = "default"
    """Namespace of all objects."""
    kind: Literal["trainjob", "jobset"] = "trainjob"
    """Kind of object: a TrainJob, or a JobSet if Kubeflow Trainer is not installed."""
    runtime: str | None = None
    """An installed ClusterTrainingRuntime for torch; empty: create a TrainingRuntime that restarts a job."""
    restarts: int = Field(3, ge=0)
    """How often all pods restart after one failed. Evictions and lost nodes do not count."""
    queue: str | None = None
    """Kueue LocalQueue that admits the job; empty: start it at once."""
    priority: str | None = None
    """Kueue WorkloadPriorityClass."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name of a GPU."""
    shared_memory_gib: int = Field(16, ge=1)
    """Size of /dev/shm in GiB, which NCCL and the data loaders use; counts as memory of the pod."""
    grace_seconds: int = Field(120, ge=5)
    """Seconds that a pod has to save a checkpoint after SIGTERM."""
    start_minutes: float = Field(60.0, gt=0)
    """Minutes that the pods of an admitted job may take to start before the job counts as failed."""
    node_selector: dict[str, str] = Field({})
    """Labels that nodes must have."""
    service_account: str | None = None
    """Service account of the pods; they need no permissions."""
    pull_secret: str | None = None
    """Secret with the registry's credentials."""
    secrets: dict[str, str] = Field({})
    """Environment variables from Secrets of the namespace: NAME: SECRET/KEY."""

    @field_validator("mount")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not PurePosixPath(path).is_absolute() or path == "/":
            raise ValueError("the mount must be an absolute path other than /")
        return path

    @field_validator("secrets")
    @classmethod
    def _secret_and_key(cls, secrets: dict[str, str]) -> dict[str, str]:
        for name, place in secrets.items():
            if len(place.split("/")) != 2 or "" in place.split("/"):
                raise ValueError(f"{name}: write SECRET/KEY, not '{place}'")
        return secrets


def manifests(config: KubernetesConfig, job: Path, processes: int, run: str, attempt: int, name: str) -> Any:
    """The objects of a job in the order of their creation; the last is the job itself."""
    if config.kind == "jobset":
        objects = [_jobset(config, job, processes, name)]
    elif config.runtime:
        objects = [_trainjob(config, job, processes, name)]
    else:
        objects = [_runtime(config), _trainjob(config, job, processes, name)]
    # A digest to compare with an existing object of the name, because servers fill in defaults.
    written = json.dumps(objects, sort_keys=True).encode()
    marks = {RUN: run, ATTEMPT: str(attempt), DIGEST: hashlib.sha256(written).hexdigest()[:16]}
    objects[-1]["metadata"]["annotations"] = marks
    return objects


def resource_of(manifest: Manifest) -> tuple[str, str, str]:
    """Group, version and plural name of an object's kind, as in its URL."""
    group, version = manifest["apiVersion"].split("/")
    return group, version, manifest["kind"].lower() + "s"


def _trainjob(config: KubernetesConfig, job: Path, processes: int, name: str) -> Manifest:
    kind = "ClusterTrainingRuntime" if config.runtime else "TrainingRuntime"
    runtime = config.runtime or _runtime(config)["metadata"]["name"]
    pod = _pod(config)
    # The Trainer takes variables, image and resources of its container from `trainer` only.
    pod["containers"] = [{"name": NODE, "securityContext": _UNPRIVILEGED, "volumeMounts": _mounts(config)}]
    patched = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    spec: Manifest = {
        "runtimeRef": {"apiGroup": TRAINER[0], "kind": kind, "name": runtime},
        "trainer": {
            "image": config.image,
            "command": torchrun.node_command(job, python=config.python),
            "numNodes": config.nodes,
            "numProcPerNode": processes,
            "resourcesPerNode": _resources(config),
            "env": _environment(config),
        },
        "runtimePatches": [
            {
                "manager": "dpo.io/launcher",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patched]}}},
            }
        ],
    }
    if config.hours:
        spec["activeDeadlineSeconds"] = int(config.hours * 3600)
    return _object(TRAINER, "TrainJob", config, name, spec)


def _runtime(config: KubernetesConfig) -> Manifest:
    """The TrainingRuntime with the failure policy, which a TrainJob itself cannot have.

    All jobs with the same number of restarts share one; it is not deleted with them.
    """
    pod = {"restartPolicy": "Never", "containers": [{"name": NODE, "image": "set-by-the-trainjob"}]}
    template = {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": _failing_once() | {"template": {"spec": pod}},
    }
    spec = {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "failurePolicy": _failure_policy(config),
                "replicatedJobs": [{"name": NODE, "template": template}],
            }
        },
    }
    made = _object(TRAINER, "TrainingRuntime", config, f"dpo-torch-r{config.restarts}", spec)
    made["metadata"]["labels"] = _OURS | {"trainer.kubeflow.org/framework": "torch"}
    return made


def _jobset(config: KubernetesConfig, job: Path, processes: int, name: str) -> Manifest:
    rank = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    meeting = [
        {"name": "PET_NNODES", "value": str(config.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(processes)},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": rank}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-{NODE}-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(PORT)},
    ]
    container = {
        "name": NODE,
        "image": config.image,
        "command": torchrun.node_command(job, python=config.python),
        "env": _environment(config) + meeting,
        "resources": _resources(config),
        "securityContext": _UNPRIVILEGED,
        "volumeMounts": _mounts(config),
    }
    pod = _pod(config) | {"restartPolicy": "Never", "containers": [container]}
    limit = {"activeDeadlineSeconds": int(config.hours * 3600)} if config.hours else {}
    template = {
        "spec": {"parallelism": config.nodes, "completions": config.nodes, "completionMode": "Indexed"}
        | _failing_once()
        | limit
        | {"template": {"spec": pod}},
    }
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": _failure_policy(config),
        "replicatedJobs": [{"name": NODE, "replicas": 1, "template": template}],
    }
    return _object(JOBSET, "JobSet", config, name, spec)


_OURS = {"app.kubernetes.io/managed-by": "dpo"}
_UNPRIVILEGED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _object(api: tuple[str, str], kind: str, config: KubernetesConfig, name: str, spec: Manifest) -> Manifest:
    labels = dict(_OURS)
    if config.queue:
        labels["kueue.x-k8s.io/queue-name"] = config.queue
    if config.priority:
        labels["kueue.x-k8s.io/priority-class"] = config.priority
    metadata = {"name": name, "namespace": config.namespace, "labels": labels}
    return {"apiVersion": "/".join(api), "kind": kind, "metadata": metadata, "spec": spec}


def _failing_once() -> Manifest:
    """A pod that fails ends its Job at once, because the others cannot continue without it."""
    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {"backoffLimit": 0, "podFailurePolicy": {"rules": [disrupted]}}


def _failure_policy(config: KubernetesConfig) -> Manifest:
    return {
        "maxRestarts": config.restarts,
        "restartStrategy": "Recreate",
        "rules": [
            {
                "name": "disrupted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }


def _pod(config: KubernetesConfig) -> Manifest:
    pod: Manifest = {
        "terminationGracePeriodSeconds": config.grace_seconds,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": config.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{config.shared_memory_gib}Gi"}},
        ],
    }
    if config.node_selector:
        pod["nodeSelector"] = dict(config.node_selector)
    if config.service_account:
        pod["serviceAccountName"] = config.service_account
    if config.pull_secret:
        pod["imagePullSecrets"] = [{"name": config.pull_secret}]
    return pod


def _mounts(config: KubernetesConfig) -> list[Manifest]:
    return [{"name": "workspace", "mountPath": config.mount}, {"name": "shm", "mountPath": "/dev/shm"}]


def _resources(config: KubernetesConfig) -> Manifest:
    amounts: dict[str, str] = {}
    if config.gpus:
        amounts[config.gpu_resource] = str(config.gpus)
    if config.cpus:
        amounts["cpu"] = str(config.cpus)
    if config.memory_gib:
        amounts["memory"] = f"{config.memory_gib}Gi"
    # Requests equal to limits, so that a node short of memory evicts this pod last.
    return {"limits": amounts, "requests": dict(amounts)} if amounts else {}


def _environment(config: KubernetesConfig) -> list[Manifest]:
    variables = torchrun.NODE_ENVIRONMENT | config.environment
    entries: list[Manifest] = [{"name": name, "value": value} for name, value in variables.items()]
    for name, place in config.secrets.items():
        secret, key = place.split("/")
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return entries
