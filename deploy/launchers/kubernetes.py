"""The launcher for Kubernetes: creates a JobSet and watches it through the API."""

import logging
import time
from pathlib import Path
from typing import Any

import yaml

from deploy.launchers import kubernetes_reasons as reasons
from deploy.launchers.base import LOG, State, final_state, tail
from deploy.launchers.cluster import ClusterLauncher, Handle, require_seen
from deploy.launchers.kubernetes_api import KubeApi
from deploy.launchers.kubernetes_manifests import KubernetesConfig, Manifest, jobset
from dpo_core.errors import StageFailed

log = logging.getLogger("dpo")

_INDEX = "batch.kubernetes.io/job-completion-index"
_AFTER_GRACE = 20.0
"""Seconds, beyond the pods' grace time, until the API must report them gone."""


class KubernetesLauncher(ClusterLauncher):
    """Launches a job as a JobSet."""

    pause = 3.0
    config: KubernetesConfig

    def __init__(self, config: KubernetesConfig, run: str, api: KubeApi | None = None) -> None:
        super().__init__(config, run)
        self._api = api
        self._not_started: dict[str, float] = {}
        self._reasons: dict[str, str] = {}

    @property
    def api(self) -> KubeApi:
        """The API, connected at the first use so that `render` needs no cluster."""
        if self._api is None:
            self._api = KubeApi(self.config.namespace)
        return self._api

    def render(self, job: Path, processes: int) -> str:
        self.config.check(processes)
        return yaml.safe_dump(self._manifest(job, processes), sort_keys=False)

    def require_seen(self, folder: Path) -> None:
        require_seen(folder, self.config.mount, "on the volume that the pods mount")

    def require_client(self) -> None:
        _ = self.api

    def find(self, work: Path) -> str | None:
        return str(Handle(self.name, work)) if self.api.get(self.name) else None

    def submit(self, job: Path, processes: int, work: Path) -> str:
        handle = super().submit(job, processes, work)
        marks = (self.api.get(self.name) or {}).get("metadata", {}).get("annotations", {})
        expected = self._manifest(job.absolute(), processes)["metadata"]["annotations"]
        if marks and any(marks.get(key) != value for key, value in expected.items()):
            raise StageFailed(
                f"a job named {self.name} exists and belongs to another run or has other settings",
                "Delete that job, then resume the run",
            )
        return handle

    def start(self, job: Path, processes: int, work: Path) -> str:
        # False if another machine was faster, or an earlier request did arrive.
        self.api.create(self._manifest(job, processes))
        return str(Handle(self.name, work))

    def poll(self, handle: str) -> State:
        name, work = Handle.parse(handle)
        existing = self.api.get(name)
        if existing is None:
            self._reasons.setdefault(handle, "its object was deleted from the cluster")
            return final_state(work)
        if reasons.condition(existing, "Completed", "Failed"):
            self._keep_reason(handle, existing)
            return final_state(work)
        pods = self.api.pods(name)
        if not self._may_start(handle, existing, pods):
            self._keep_reason(handle, existing)
            return State.FAILED
        return State.RUNNING

    def why(self, handle: str) -> str:
        if handle in self._reasons:
            return self._reasons[handle]
        name, _ = Handle.parse(handle)
        existing = self.api.get(name)
        return self._reason(existing) if existing else "its object was deleted from the cluster"

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Delete the job's object; the pods get SIGTERM and save."""
        name, _ = Handle.parse(handle)
        existing = self.api.get(name)
        if existing is None and not self.api.pods(name):
            return
        if existing is not None:
            self._keep_reason(handle, existing)
        # The owner first, because it would recreate pods.
        self.api.delete(name)
        self.api.end_pods(name, grace)
        limit = time.monotonic() + grace + _AFTER_GRACE
        while time.monotonic() < limit:
            left = self.api.pods(name)
            if not left and self.api.get(name) is None:
                return
            time.sleep(0.2)
        # The kubelet of a lost node confirms nothing, so remove the pods from the API without it.
        names = ", ".join(pod["metadata"]["name"] for pod in left)
        log.warning("pods of %s do not end (%s); removing them from the API", name, names or "none left")
        self.api.end_pods(name, 0)

    def logs(self, handle: str, lines: int = 50) -> str:
        name, work = Handle.parse(handle)
        first = self._first_pod(name)
        text = self.api.log(first, lines) if first else ""
        return text.rstrip("\n") or tail(work, lines)

    def _manifest(self, job: Path, processes: int) -> Manifest:
        return jobset(self.config, job, processes, run=self.run, attempt=self.attempt, name=self.name)

    def _may_start(self, handle: str, existing: Manifest, pods: list[Manifest]) -> bool:
        """Whether the pods run or can still start in time. Time in the queue does not count."""
        if any(reasons.is_hopeless(pod) for pod in pods):
            return False
        started = len(pods) >= self.config.nodes and all(_phase(pod) != "Pending" for pod in pods)
        if started or reasons.condition(existing, "Suspended"):
            self._not_started.pop(handle, None)
            return True
        since = self._not_started.setdefault(handle, time.monotonic())
        return time.monotonic() - since <= self.config.start_minutes * 60

    def _reason(self, existing: Manifest) -> str:
        """The cluster's reason: from the queue, then the pods, then events, then the job."""
        name = existing["metadata"]["name"]
        queue = self._queue_reason(existing)
        if queue:
            return queue
        pods = filter(None, (reasons.of_pod(pod) for pod in self.api.pods(name)))
        # Ranks that lost another rank exit with a status too, so disruptions come first.
        of_pods = sorted(set(pods), key=lambda reason: "ended with status" in reason)
        if of_pods:
            return of_pods[0]
        warnings = [reasons.of_event(event) for event in self.api.warnings(name)]
        if warnings:
            return warnings[-1]
        failed = reasons.condition(existing, "Failed")
        return f"{failed.get('reason')}: {failed.get('message')}" if failed else ""

    def _queue_reason(self, existing: Manifest) -> str:
        if not reasons.condition(existing, "Suspended"):
            return ""
        workload = self.api.workload(existing["metadata"]["name"])
        for condition in workload.get("status", {}).get("conditions", []):
            if condition["type"] == "QuotaReserved" and condition["status"] == "False":
                return f"waiting in queue {self.config.queue}: {condition.get('message')}"
        return f"suspended, waiting in queue {self.config.queue}" if self.config.queue else "suspended"

    def _keep_reason(self, handle: str, existing: Manifest) -> None:
        """Save the log and the reason, which are deleted with the pods."""
        if handle in self._reasons:
            return
        name, work = Handle.parse(handle)
        # Warnings about a job that is done are outdated.
        reason = "" if final_state(work) is State.DONE else self._reason(existing)
        self._reasons[handle] = reason
        first = self._first_pod(name)
        text = self.api.log(first) if first else ""
        if text or reason:
            with (work / LOG).open("a") as file:
                file.write(text + (f"kubernetes: {reason}\n" if reason else ""))

    def _first_pod(self, name: str) -> str | None:
        """The newest pod of rank 0."""
        first = [pod for pod in self.api.pods(name) if _index(pod) == "0"]
        first.sort(key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
        return first[-1]["metadata"]["name"] if first else None


def _phase(pod: Manifest) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _index(pod: Manifest) -> Any:
    metadata = pod["metadata"]
    return metadata.get("labels", {}).get(_INDEX) or metadata.get("annotations", {}).get(_INDEX)
