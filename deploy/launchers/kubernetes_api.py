"""The requests to the Kubernetes API that a launcher makes, and the user errors of refused ones.

The official package finds the credentials, a kubeconfig with its login or the service account of the pod, and
retries while the server is slow or unreachable. Kubeflow's own SDK (0.5) does not do, by its source: it turns
every refusal into one RuntimeError, so that a taken name, a quota and an outage look alike, and it has
neither the reasons of pods and queues, nor variables from Secrets, nor a grace time for a deletion.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from urllib3 import Retry
from urllib3.exceptions import HTTPError

from dpo_core.errors import RecipeError, StageFailed

Json = dict[str, Any]

TIMEOUT = 15.0
"""Maximum seconds of one request."""
RETRIES = 45
"""How often a request is repeated, up to 15 s apart: for ten minutes while the server refuses connections,
and for twenty while it hangs. The job continues meanwhile."""
JOBSETS = ("jobset.x-k8s.io", "v1alpha2", "jobsets")
WORKLOADS = ("kueue.x-k8s.io", "v1beta2", "workloads")


def connect(retries: int = RETRIES) -> Any:
    """An API client with the credentials of this machine.

    Raises:
        RecipeError: the package or the credentials are missing.
    """
    try:
        from kubernetes import client, config  # noqa: PLC0415 - optional
    except ImportError as error:
        raise RecipeError(
            "launching on Kubernetes needs the package kubernetes", "pip install 'dpo-pipeline[kubernetes]'"
        ) from error
    settings = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            # Passed explicitly, because the package reads the variable only when it is imported.
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
    except config.ConfigException as error:
        raise RecipeError(
            f"there are no credentials for a Kubernetes cluster ({error})",
            "Set KUBECONFIG, or log in to your cluster",
        ) from error
    settings.retries = Retry(
        total=retries,
        backoff_factor=0.25,
        backoff_max=15,
        status_forcelist=[429, 500, 502, 503, 504],
        allowed_methods=None,
    )
    return client.ApiClient(settings)


class KubeApi:
    """Reads and changes the JobSets of one namespace and their pods, as plain JSON."""

    def __init__(self, namespace: str, api: Any = None) -> None:
        api = api or connect()
        from kubernetes import client  # noqa: PLC0415 - optional

        self.namespace = namespace
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def get(self, name: str) -> Json | None:
        """A JobSet; None if it does not exist."""
        call = self._objects.get_namespaced_custom_object
        return self._call(call, *self._place(JOBSETS), name, missing=(404,))

    def create(self, manifest: Json) -> bool:
        """Create a JobSet; False if its name is taken.

        Raises:
            StageFailed: the server refuses it, for quota, permissions or a field.
        """
        call = self._objects.create_namespaced_custom_object
        return self._call(call, *self._place(JOBSETS), manifest, missing=(409,)) is not None

    def delete(self, name: str) -> None:
        """Delete a JobSet after all objects that it owns."""
        call = self._objects.delete_namespaced_custom_object
        self._call(call, *self._place(JOBSETS), name, missing=(404,), propagation_policy="Foreground")

    def pods(self, name: str) -> list[Json]:
        """The pods of a JobSet."""
        return self._list(self._core.list_namespaced_pod, label_selector=_pods_of(name))

    def end_pods(self, name: str, grace: float) -> None:
        """Delete the pods of a JobSet with so many seconds of grace; with 0 the kubelets need not confirm."""
        call = self._core.delete_collection_namespaced_pod
        self._call(call, self.namespace, label_selector=_pods_of(name), grace_period_seconds=int(grace))

    def log(self, pod: str, lines: int | None = None) -> str:
        """The output of a pod; empty if it is gone or never started."""
        options: Json = {"tail_lines": lines} if lines else {}
        call = self._core.read_namespaced_pod_log
        answer = self._call(call, pod, self.namespace, missing=(400, 404), _preload_content=False, **options)
        return answer.data.decode(errors="replace") if answer is not None else ""

    def warnings(self, part: str) -> list[Json]:
        """Warnings about objects whose name contains this text, oldest first."""
        events = self._list(self._core.list_namespaced_event, field_selector="type=Warning")
        matching = [event for event in events if part in event["involvedObject"]["name"]]
        return sorted(matching, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")

    def workload(self, owner: str) -> Json:
        """Kueue's Workload of a JobSet; empty without Kueue or without permission to read it."""
        call = self._objects.list_namespaced_custom_object
        listed = self._call(call, *self._place(WORKLOADS), missing=(403, 404)) or {}
        for workload in listed.get("items", []):
            if owner in {o["name"] for o in workload["metadata"].get("ownerReferences", [])}:
                return workload
        return {}

    def _place(self, kind: tuple[str, str, str]) -> tuple[str, str, str, str]:
        group, version, plural = kind
        return group, version, self.namespace, plural

    def _list(self, call: Callable[..., Any], **options: Any) -> list[Json]:
        return json.loads(self._call(call, self.namespace, _preload_content=False, **options).data)["items"]

    def _call(
        self, call: Callable[..., Any], *arguments: Any, missing: tuple[int, ...] = (), **options: Any
    ) -> Any:
        """The answer; None if its status is in `missing`."""
        from kubernetes.client import ApiException  # noqa: PLC0415 - optional

        try:
            return call(*arguments, _request_timeout=TIMEOUT, **options)
        except ApiException as error:
            if error.status in missing:
                return None
            raise _refused(error) from error
        except HTTPError as error:
            raise StageFailed(
                f"the Kubernetes API has not answered ({error})",
                "The job may continue; resume the run when the API is back",
            ) from error


def _pods_of(name: str) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={name}"


def _refused(error: Any) -> StageFailed:
    """The user error for a refused request, with its remedy."""
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = f"{error.status} {error.reason}"
    if "exceeded quota" in message:
        return StageFailed(
            f"quota exceeded: {message}", "Request less, wait for other jobs, or have the quota raised"
        )
    remedies = {
        401: "Log in to the cluster again",
        403: "Ask the namespace's administrator for permission",
        404: "Install JobSet on the cluster (Kubeflow Trainer contains it)",
        422: "Change the setting that the message names",
    }
    remedy = remedies.get(error.status, "Check the settings of the cluster")
    return StageFailed(f"Kubernetes refused the request ({error.status}): {message}", remedy)
