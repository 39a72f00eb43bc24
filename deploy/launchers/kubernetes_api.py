"""A small client of the Kubernetes API that retries while the server is slow or unreachable.

Objects are plain JSON. The `kubernetes` package finds the credentials: a kubeconfig with its login, or the
service account of the pod.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from urllib3.exceptions import HTTPError

from deploy.launchers.kubernetes_manifests import Manifest, resource_of
from dpo_core.errors import RecipeError, StageFailed

log = logging.getLogger("dpo")

TIMEOUT = 15.0
"""Maximum seconds of one request."""
_LATER = {429, 500, 502, 503, 504}


def connect() -> Any:
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
    return client.ApiClient(settings)


class KubeApi:
    """Reads and changes the objects of one namespace.

    Args:
        away_seconds: how long the server may be unreachable before a call fails; the job continues meanwhile.
    """

    def __init__(self, namespace: str, api: Any = None, away_seconds: float = 600.0) -> None:
        api = api or connect()
        from kubernetes import client  # noqa: PLC0415 - optional

        # The package's retries would multiply with ours.
        api.rest_client.pool_manager.connection_pool_kw["retries"] = False
        self.namespace, self.away_seconds = namespace, away_seconds
        self.objects, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def get(self, resource: tuple[str, str, str], name: str) -> Manifest | None:
        """One object; None if it does not exist."""
        group, version, plural = resource
        call = self.objects.get_namespaced_custom_object
        return self._call(call, group, version, self.namespace, plural, name, missing=None)

    def create(self, manifest: Manifest) -> bool:
        """Create an object; False if its name is taken.

        Raises:
            StageFailed: the server refuses it, for quota, permissions or a field.
        """
        group, version, plural = resource_of(manifest)
        call = self.objects.create_namespaced_custom_object
        made = self._call(call, group, version, self.namespace, plural, manifest, taken=False)
        return made is not False

    def delete(self, resource: tuple[str, str, str], name: str) -> None:
        """Delete an object after all objects that it owns."""
        group, version, plural = resource
        call = self.objects.delete_namespaced_custom_object
        options = {"propagation_policy": "Foreground"}
        self._call(call, group, version, self.namespace, plural, name, missing=None, **options)

    def pods(self, jobset: str) -> list[Manifest]:
        """The pods of a JobSet."""
        call = self.core.list_namespaced_pod
        selector = f"jobset.sigs.k8s.io/jobset-name={jobset}"
        return self._list(call, self.namespace, label_selector=selector)

    def end_pods(self, jobset: str, grace: float) -> None:
        """Delete the pods of a JobSet with so many seconds of grace; with 0 the kubelets need not confirm."""
        call = self.core.delete_collection_namespaced_pod
        selector = f"jobset.sigs.k8s.io/jobset-name={jobset}"
        self._call(call, self.namespace, label_selector=selector, grace_period_seconds=int(grace))

    def log(self, pod: str, lines: int | None = None) -> str:
        """The output of a pod; empty if it is gone or never started."""
        call = self.core.read_namespaced_pod_log
        options = {"tail_lines": lines} if lines else {}
        answer = self._call(
            call, pod, self.namespace, missing=None, unready=None, _preload_content=False, **options
        )
        return answer.data.decode(errors="replace") if answer is not None else ""

    def warnings(self, part: str) -> list[Manifest]:
        """Warnings about objects whose name contains this text, oldest first."""
        events = self._list(self.core.list_namespaced_event, self.namespace, field_selector="type=Warning")
        matching = [event for event in events if part in event["involvedObject"]["name"]]
        return sorted(matching, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")

    def workload(self, owner: str) -> Manifest | None:
        """Kueue's Workload of an object; None without Kueue or without permission to read it."""
        call = self.objects.list_namespaced_custom_object
        place = ("kueue.x-k8s.io", "v1beta2", self.namespace, "workloads")
        listed = self._call(call, *place, missing=None, forbidden=None) or {}
        for workload in listed.get("items", []):
            if owner in {o["name"] for o in workload["metadata"].get("ownerReferences", [])}:
                return workload
        return None

    def _list(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> list[Manifest]:
        answer = self._call(call, *arguments, _preload_content=False, **options)
        return json.loads(answer.data)["items"]

    def _call(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call until the server answers. Values passed as `missing` (404), `taken` (409), `unready` (400) and
        `forbidden` (403) are returned instead of an error."""
        from kubernetes.client import ApiException  # noqa: PLC0415 - optional

        names = {400: "unready", 403: "forbidden", 404: "missing", 409: "taken"}
        instead = {code: options.pop(name) for code, name in names.items() if name in options}
        limit, pause = time.monotonic() + self.away_seconds, 0.25
        while True:
            try:
                return call(*arguments, _request_timeout=TIMEOUT, **options)
            except ApiException as error:
                if error.status in instead:
                    return instead[error.status]
                if error.status not in _LATER:
                    raise _refused(error) from error
                problem = f"{error.status} {error.reason}"
            except HTTPError as error:
                problem = str(error)
            if time.monotonic() + pause > limit:
                raise StageFailed(
                    f"the Kubernetes API has not answered for {self.away_seconds:g} s ({problem})",
                    "The job may continue; resume the run when the API is back",
                )
            log.debug("the Kubernetes API: %s; retrying in %g s", problem, pause)
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


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
        404: "Install this kind of object on the cluster, or choose kind=jobset",
        422: "Change the setting that the message names",
    }
    remedy = remedies.get(error.status, "Check the settings of the cluster")
    return StageFailed(f"Kubernetes refused the request ({error.status}): {message}", remedy)
