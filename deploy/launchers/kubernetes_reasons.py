"""Explains why pods do not run, from the JSON of their objects in the Kubernetes API."""

from typing import Any

from deploy.launchers.base import command_end

Json = dict[str, Any]

DISRUPTIONS = {
    "PreemptionByScheduler": "preempted by a pod of higher priority",
    "PreemptionByKubeScheduler": "preempted by a pod of higher priority",
    "DeletionByTaintManager": "its node was lost or tainted",
    "DeletionByPodGC": "its node was lost",
    "EvictionByEvictionAPI": "evicted: its node is drained",
    "TerminationByKubelet": "evicted by its node",
}
_PULLS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_UNMADE = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_HOPELESS = {"InvalidImageName", "ErrImageNeverPull"}


def of_pod(pod: Json) -> str:
    """The problem of a pod; empty if there is none."""
    status = pod.get("status", {})
    problem = _disruption(status) or _container(status) or _unscheduled(status)
    return f"pod {pod['metadata']['name']}: {problem}" if problem else ""


def _disruption(status: Json) -> str:
    if status.get("reason") == "Evicted":
        return f"evicted by its node ({_flat(status.get('message'))})"
    for condition in status.get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            words = DISRUPTIONS.get(condition.get("reason", ""), condition.get("reason", "disrupted"))
            return f"{words} ({_flat(condition.get('message'))})"
    # The node controller marks the pods of a silent node, and their containers still seem to run.
    if status.get("reason") == "NodeLost":
        return f"its node was lost ({_flat(status.get('message'))})"
    return ""


def _container(status: Json) -> str:
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        waiting, end = state.get("waiting", {}), state.get("terminated") or {}
        if waiting.get("reason") in _PULLS:
            return f"the image is not pulled: {waiting['reason']} ({_flat(waiting.get('message'))})"
        if waiting.get("reason") in _UNMADE:
            return f"the container cannot be created: {_flat(waiting.get('message'))}"
        if end.get("reason") == "OOMKilled":
            return "out of memory: the container exceeded its memory limit"
        if end.get("exitCode"):
            return command_end(str(end["exitCode"]))
    return ""


def _unscheduled(status: Json) -> str:
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"no node can run it: {_flat(condition.get('message'))}"
    return ""


def of_event(event: Json) -> str:
    """The text of a warning about the job's objects."""
    message = _flat(event.get("message"))
    return f"quota exceeded: {message}" if "exceeded quota" in message else message


def is_hopeless(pod: Json) -> bool:
    """Whether the pod can never start."""
    containers = pod.get("status", {}).get("containerStatuses", [])
    return any(c.get("state", {}).get("waiting", {}).get("reason") in _HOPELESS for c in containers)


def condition(manifest: Json, *names: str) -> Json | None:
    """The first condition of these types that is true."""
    for entry in manifest.get("status", {}).get("conditions") or []:
        if entry["type"] in names and entry["status"] == "True":
            return entry
    return None


def _flat(text: str | None) -> str:
    return " ".join((text or "no message").split())[:400]
