"""Training on Kubernetes: a TrainJob or a JobSet, watched through the API."""

import logging
import time
from pathlib import Path
from typing import Any

import yaml

from deploy.launchers import kubernetes_reasons as reasons
from deploy.launchers.base import LOG, State, clear, ended, tail
from deploy.launchers.cluster import Handle, job_name, require_seen
from deploy.launchers.kubernetes_api import KubeApi
from deploy.launchers.kubernetes_manifests import (
    ATTEMPT,
    DIGEST,
    JOBSET,
    RUN,
    TRAINER,
    KubernetesConfig,
    Manifest,
    manifests,
)
from dpo_core.errors import StageFailed

log = logging.getLogger("dpo")

_INDEX = "batch.kubernetes.io/job-completion-index"
_AFTER_GRACE = 20.0
"""Seconds for the kubelet and the API to agree that pods are gone, beyond their own grace."""


class KubernetesLauncher:
    """One attempt at a run. Any process with the same settings, run and attempt finds its job again."""

    pause = 3.0

    def __init__(
        self, config: KubernetesConfig, run: str, attempt: int = 1, api: KubeApi | None = None
    ) -> None:
        self.config, self.run, self.attempt = config, run, attempt
        self.name = job_name(run, attempt)
        self.resource = (*JOBSET, "jobsets") if config.kind == "jobset" else (*TRAINER, "trainjobs")
        self._api = api
        self._not_started: dict[str, float] = {}
        self._last_words: dict[str, str] = {}

    @property
    def api(self) -> KubeApi:
        """Connected at the first call, so that rendering needs no cluster."""
        if self._api is None:
            self._api = KubeApi(self.config.namespace)
        return self._api

    def render(self, job: Path, processes: int) -> str:
        return "---\n".join(yaml.safe_dump(m, sort_keys=False) for m in self._manifests(job, processes))

    def require_seen(self, folder: Path) -> None:
        """Refuse a folder that does not lie on the volume."""
        require_seen(folder, self.config.mount, "on the volume, which pods see")

    def require_client(self) -> None:
        """Refuse to go on without credentials."""
        _ = self.api

    def find(self, work: Path) -> str | None:
        """The handle of the job of this run and attempt, None where there is none."""
        there = self.api.get(self.resource, self.name)
        return str(Handle(self.name, work)) if there else None

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Create the job, or find the one that an earlier call created.

        Raises:
            RecipeError: the job does not lie on the volume.
            StageFailed: the API refuses, or the name belongs to something else.
        """
        job, work = job.absolute(), work.absolute()
        for path in (job, work):
            self.require_seen(path)
        made = self._manifests(job, processes)
        there = self.api.get(self.resource, self.name)
        if there is None:
            clear(work)
            for manifest in made:
                created = self.api.create(manifest)
            if not created:  # another process was faster, or our first request had arrived after all
                there = self.api.get(self.resource, self.name)
        if there is not None:
            _check_same(there, made[-1])
        return str(Handle(self.name, work))

    def poll(self, handle: str) -> State:
        name, work = Handle.parse(handle)
        there = self.api.get(self.resource, name)
        if there is None:
            self._last_words.setdefault(handle, "its object was deleted from the cluster")
            return ended(work)
        if reasons.condition(there, "Complete", "Completed", "Failed"):
            self._keep_words(handle, there)
            return ended(work)
        pods = self.api.pods(name)
        if not self._may_start(handle, there, pods):
            self._keep_words(handle, there)
            return State.FAILED
        return State.RUNNING

    def why(self, handle: str) -> str:
        if handle in self._last_words:
            return self._last_words[handle]
        name, _ = Handle.parse(handle)
        there = self.api.get(self.resource, name)
        return self._words(there) if there else "its object was deleted from the cluster"

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Delete the job's object; the pods get SIGTERM and save."""
        name, _ = Handle.parse(handle)
        there = self.api.get(self.resource, name)
        if there is None and not self.api.pods(name):
            return
        if there is not None:
            self._keep_words(handle, there)
        # First the owner, or pods would be made anew.
        self.api.delete(self.resource, name)
        self.api.end_pods(name, grace)
        limit = time.monotonic() + grace + _AFTER_GRACE
        while time.monotonic() < limit:
            left = self.api.pods(name)
            if not left and self.api.get(self.resource, name) is None:
                return
            time.sleep(0.2)
        # The kubelet of a lost node confirms nothing; the node itself stops what it was told to stop.
        names = ", ".join(pod["metadata"]["name"] for pod in left)
        log.warning("pods of %s do not end (%s); they are removed from the API", name, names or "none left")
        self.api.end_pods(name, 0)

    def logs(self, handle: str, lines: int = 50) -> str:
        name, work = Handle.parse(handle)
        first = self._first_pod(name)
        text = self.api.log(first, lines) if first else ""
        return text.rstrip("\n") or tail(work, lines)

    def _manifests(self, job: Path, processes: int) -> list[Manifest]:
        self.config.check(processes)
        return manifests(self.config, job, processes, self.run, self.attempt, self.name)

    def _may_start(self, handle: str, there: Manifest, pods: list[Manifest]) -> bool:
        """Whether the pods run, or may yet. Time in the queue does not count."""
        if any(reasons.is_hopeless(pod) for pod in pods):
            return False
        started = len(pods) >= self.config.nodes and all(_phase(pod) != "Pending" for pod in pods)
        if started or reasons.condition(there, "Suspended"):
            self._not_started.pop(handle, None)
            return True
        since = self._not_started.setdefault(handle, time.monotonic())
        return time.monotonic() - since <= self.config.start_minutes * 60

    def _words(self, there: Manifest) -> str:
        """The cluster's own account: of the pods first, then of whoever makes them, then of the job."""
        name = there["metadata"]["name"]
        queue = self._queue_words(there)
        if queue:
            return queue
        pods = filter(None, (reasons.of_pod(pod) for pod in self.api.pods(name)))
        # A rank that only misses another ends with a status of its own; disruptions are told before.
        said = sorted(set(pods), key=lambda words: "ended with status" in words)
        if said:
            return said[0]
        warned = [reasons.of_event(event) for event in self.api.warnings(name)]
        if warned:
            return warned[-1]
        failed = reasons.condition(there, "Failed")
        return f"{failed.get('reason')}: {failed.get('message')}" if failed else ""

    def _queue_words(self, there: Manifest) -> str:
        if not reasons.condition(there, "Suspended"):
            return ""
        workload = self.api.workload(there["metadata"]["name"]) or {}
        for condition in workload.get("status", {}).get("conditions", []):
            if condition["type"] == "QuotaReserved" and condition["status"] == "False":
                return f"waiting in queue {self.config.queue}: {condition.get('message')}"
        return f"suspended, waiting in queue {self.config.queue}" if self.config.queue else "suspended"

    def _keep_words(self, handle: str, there: Manifest) -> None:
        """Keep the log and the reason: they go with the pods."""
        if handle in self._last_words:
            return
        name, work = Handle.parse(handle)
        # Of a job that is done, old warnings say nothing.
        words = "" if ended(work) is State.DONE else self._words(there)
        self._last_words[handle] = words
        first = self._first_pod(name)
        text = self.api.log(first) if first else ""
        if text or words:
            with (work / LOG).open("a") as file:
                file.write(text + (f"kubernetes: {words}\n" if words else ""))

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


def _check_same(there: Manifest | None, ours: Manifest) -> None:
    """Refuse to watch a job of the same name that is another."""
    marks = (there or {}).get("metadata", {}).get("annotations", {})
    wanted = ours["metadata"]["annotations"]
    if there is None or any(marks.get(key) != wanted[key] for key in (RUN, ATTEMPT, DIGEST)):
        raise StageFailed(
            f"a job named {ours['metadata']['name']} exists with other settings",
            "Give the next attempt a number of its own, or delete that job",
        )
