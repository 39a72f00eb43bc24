"""Builds the Kubernetes object of a job: a JobSet, which Kueue admits and Kubeflow Trainer makes too.

Fields as in JobSet 0.12 (`jobset.x-k8s.io/v1alpha2`). torchrun is process 1 of every pod, so that the
kubelet's SIGTERM reaches it; it reads its place from `PET_*` variables.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from deploy.launchers import torchrun
from deploy.launchers.cluster import ClusterConfig, MountPath

Manifest = dict[str, Any]

RUN, ATTEMPT, DIGEST = "dpo.io/run", "dpo.io/attempt", "dpo.io/digest"
NODE = "node"
"""Name of the replicated job and of its container."""


class KubernetesConfig(ClusterConfig):
    """Settings of jobs on Kubernetes."""

    image: str
    """Image with this package; it runs as a user other than root."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) that holds the workspace."""
    mount: MountPath
    """Path at which the claim is mounted, in the pods and on the flow's machine."""
    namespace: str = "default"
    """Namespace of all objects."""
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

    @field_validator("secrets")
    @classmethod
    def _secret_and_key(cls, secrets: dict[str, str]) -> dict[str, str]:
        for name, place in secrets.items():
            if len(place.split("/")) != 2 or "" in place.split("/"):
                raise ValueError(f"{name}: write SECRET/KEY, not '{place}'")
        return secrets


def jobset(
    config: KubernetesConfig, job: Path, processes: int, *, run: str, attempt: int, name: str
) -> Manifest:
    """The JobSet of one attempt at a job.

    Args:
        processes: ranks on each node.
        run: the job's name to users; `name` is its name on the cluster.
    """
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": config.restarts,
            "restartStrategy": "Recreate",
            "rules": [
                {
                    "name": "disrupted",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "replicatedJobs": [
            {"name": NODE, "replicas": 1, "template": {"spec": _job(config, job, processes, name)}}
        ],
    }
    labels = {"app.kubernetes.io/managed-by": "dpo"}
    if config.queue:
        labels["kueue.x-k8s.io/queue-name"] = config.queue
    if config.priority:
        labels["kueue.x-k8s.io/priority-class"] = config.priority
    # A digest to compare with an existing object of the name, because servers fill in defaults.
    digest = hashlib.sha256(json.dumps([labels, spec], sort_keys=True).encode()).hexdigest()[:16]
    marks = {RUN: run, ATTEMPT: str(attempt), DIGEST: digest}
    metadata = {"name": name, "namespace": config.namespace, "labels": labels, "annotations": marks}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _job(config: KubernetesConfig, job: Path, processes: int, name: str) -> Manifest:
    """The Job of the nodes: a pod that fails ends it, because the others cannot continue without it."""
    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    spec: Manifest = {
        "parallelism": config.nodes,
        "completions": config.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [disrupted]},
        "template": {"spec": _pod(config, job, processes, name)},
    }
    if config.hours:
        spec["activeDeadlineSeconds"] = int(config.hours * 3600)
    return spec


def _pod(config: KubernetesConfig, job: Path, processes: int, name: str) -> Manifest:
    container = {
        "name": NODE,
        "image": config.image,
        "command": torchrun.node_command(job, python=config.python),
        "env": _environment(config, processes, name),
        "resources": _resources(config),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "workspace", "mountPath": config.mount},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace_seconds,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
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


def _environment(config: KubernetesConfig, processes: int, name: str) -> list[Manifest]:
    variables = torchrun.NODE_ENVIRONMENT | config.environment
    variables |= {
        "PET_NNODES": str(config.nodes),
        "PET_NPROC_PER_NODE": str(processes),
        "PET_MASTER_ADDR": f"{name}-{NODE}-0-0.{name}",
        "PET_MASTER_PORT": "29500",
    }
    entries: list[Manifest] = [{"name": key, "value": value} for key, value in variables.items()]
    rank = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    entries.append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": rank}})
    for variable, place in config.secrets.items():
        secret, key = place.split("/")
        entries.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return entries
