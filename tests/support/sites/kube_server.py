"""A small Kubernetes: its API over HTTP, the JobSet and Kueue controllers, and a kubelet that really runs the
containers' commands. Only what a launcher can notice behaves as the real one."""

import json
import os
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

Json = dict[str, Any]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


class Cluster:
    """The state of a namespace, and its controllers."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.installed = True
        self.objects: dict[str, Json] = {}
        self.pods: dict[str, Json] = {}
        self.events: list[Json] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.outputs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, str]] = []
        """What happens to the next requests of a method: a status, `slow`, `lost` (done, and no answer)."""
        self.quota: str | None = None
        """Message of the quota that refuses pods; `object:` before it refuses the job itself."""
        self.admits = True
        """Whether Kueue has room."""
        self.pending: Json | None = None
        """Status of pods that do not start; None starts them."""
        self._stop = threading.Event()
        self._loop = threading.Thread(target=self._control, daemon=True)
        self._loop.start()

    # The API

    def create(self, made: Json) -> Json:
        name = made["metadata"]["name"]
        if name in self.objects:
            raise Refused(409, f'jobsets "{name}" already exists')
        from kubeflow_trainer_api.models import JobsetV1alpha2JobSet  # takes seconds

        # The models drop fields that they do not know.
        if JobsetV1alpha2JobSet.from_dict(made).to_dict() != made:
            raise Refused(422, "JobSet is invalid: unknown field")
        if self.quota and self.quota.startswith("object:"):
            raise Refused(403, f'jobsets "{name}" is forbidden: {self.quota.removeprefix("object:")}')
        kept = json.loads(json.dumps(made))
        kept["metadata"] |= {"uid": f"uid-{name}", "creationTimestamp": "2026-01-01T00:00:00Z"}
        kept["status"] = {"conditions": []}
        if "kueue.x-k8s.io/queue-name" in kept["metadata"]["labels"]:
            kept["spec"]["suspend"] = True
        self.objects[name] = kept
        return kept

    def delete(self, name: str) -> Json:
        found = self.get(name)
        found["metadata"]["deletionTimestamp"] = "now"
        self.end_pods(name, None)
        return found

    def get(self, name: str) -> Json:
        if name not in self.objects:
            raise Refused(404, f'jobsets "{name}" not found')
        return self.objects[name]

    def end_pods(self, owner: str, grace: float | None) -> None:
        for name, pod in list(self.pods.items()):
            if pod["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] != owner:
                continue
            limit = time.monotonic() + (pod["spec"]["grace"] if grace is None else grace)
            first = "limit" not in pod["spec"]
            pod["spec"]["limit"] = limit if first else min(limit, pod["spec"]["limit"])
            process = self.processes.get(name)
            if process and first:
                process.terminate()
            elif not process or grace == 0:
                self.pods.pop(name)

    # The controllers

    def _control(self) -> None:
        while not self._stop.wait(0.02):
            with self.lock:
                for name, found in list(self.objects.items()):
                    self._job(name, found)
                self._kubelet()

    def _job(self, name: str, found: Json) -> None:
        pods = self.pods_of(name)
        if "deletionTimestamp" in found["metadata"]:
            if not pods:
                del self.objects[name]
        elif not self._holds(found, "Completed", "Failed"):
            self._go_on(name, found, pods)

    def _go_on(self, name: str, found: Json, pods: list[Json]) -> None:
        if found["spec"].get("suspend") is not None:
            found["spec"]["suspend"] = not self.admits
            self.set(found, "Suspended", not self.admits, "Suspended")
            if not self.admits:
                self.end_pods(name, None)
                return
        phases = [pod["status"]["phase"] for pod in pods]
        if "Failed" in phases:
            self._restart(found, name)
        elif pods and set(phases) == {"Succeeded"}:
            self.set(found, "Completed", True, "AllJobsCompleted")
        elif not pods:
            self._make_pods(name, found)

    def _restart(self, found: Json, name: str) -> None:
        restarts = found["status"].setdefault("restarts", 0)
        if restarts >= found["spec"]["failurePolicy"]["maxRestarts"]:
            message = "jobset failed due to one or more job failures"
            self.set(found, "Failed", True, "FailedJobs", message)
            return
        found["status"]["restarts"] += 1
        self.end_pods(name, 0.5)

    def _make_pods(self, name: str, found: Json) -> None:
        if self.quota:
            message = f'Error creating: pods "{name}-node-0-0-x" is forbidden: {self.quota}'
            self.warn(f"{name}-node-0", "FailedCreate", message)
            return
        job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
        nodes, pod = job["completions"], job["template"]["spec"]
        container = pod["containers"][0]
        restart = found["status"].get("restarts", 0)
        for rank in range(nodes):
            labels = {
                "jobset.sigs.k8s.io/jobset-name": name,
                "batch.kubernetes.io/job-completion-index": str(rank),
            }
            environment = {e["name"]: e["value"] for e in container["env"] if "value" in e}
            environment |= {"PET_NODE_RANK": str(rank)}
            pod_name = f"{name}-node-0-{rank}-{restart}"
            self.pods[pod_name] = {
                "metadata": {"name": pod_name, "labels": labels, "creationTimestamp": f"{restart:04}"},
                "spec": {
                    "grace": pod["terminationGracePeriodSeconds"],
                    "command": container["command"],
                    "env": environment,
                },
                "status": self.pending or {"phase": "Pending"},
            }

    def _kubelet(self) -> None:
        for name, pod in list(self.pods.items()):
            process = self.processes.get(name)
            limit = pod["spec"].get("limit")
            if process is None and self.pending is None and limit is None and not pod["status"].get("reason"):
                pod["status"] = {"phase": "Running"}
                # The name service of a cluster: all pods are here.
                environment = os.environ | pod["spec"]["env"] | {"PET_MASTER_ADDR": "127.0.0.1"}
                environment["PET_MASTER_PORT"] = os.environ.get("TEST_MASTER_PORT", "29500")
                output = subprocess.PIPE
                process = subprocess.Popen(
                    pod["spec"]["command"], stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                self.processes[name] = process
                self.outputs[name] = b""
                threading.Thread(target=self._read, args=(name, process), daemon=True).start()
            if process is not None and process.poll() is not None:
                if limit is not None:
                    del self.pods[name], self.processes[name]
                elif pod["status"]["phase"] == "Running":
                    code = process.returncode
                    code = 128 - code if code < 0 else code  # as a kubelet reports a signal
                    ended = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
                    phase = "Failed" if code else "Succeeded"
                    pod["status"] |= {"phase": phase, "containerStatuses": [{"name": "node", "state": ended}]}
            elif process is not None and limit is not None and time.monotonic() > limit:
                process.kill()

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        for line in process.stdout or ():
            self.outputs[name] += line

    # What tests do to it

    def lose(self, pod: str, status: Json) -> None:
        """Kill the pod's process, and say of it what the control plane would."""
        with self.lock:
            self.processes[pod].kill()
            self.processes[pod].wait()
            self.pods[pod]["status"] = {"phase": "Failed"} | status

    def warn(self, name: str, reason: str, message: str) -> None:
        event = {"involvedObject": {"name": name}, "type": "Warning", "reason": reason, "message": message}
        if not self.events or self.events[-1] != event:
            self.events.append(event)

    def set(self, found: Json, kind: str, holds: bool, reason: str, message: str = "") -> None:
        conditions = [c for c in found["status"]["conditions"] if c["type"] != kind]
        new = {"type": kind, "status": str(holds), "reason": reason, "message": message}
        found["status"]["conditions"] = [*conditions, new]

    def close(self) -> None:
        self._stop.set()
        self._loop.join()
        for process in self.processes.values():
            process.kill()
            process.wait()

    def workloads(self) -> list[Json]:
        """Kueue's view of the suspended jobs."""
        message = "couldn't assign flavors: insufficient unused quota for nvidia.com/gpu"
        reserved = {"type": "QuotaReserved", "status": str(self.admits), "message": message}
        return [
            {"metadata": {"ownerReferences": [{"name": name}]}, "status": {"conditions": [reserved]}}
            for name, found in self.objects.items()
            if "suspend" in found["spec"]
        ]

    def pods_of(self, name: str) -> list[Json]:
        label = "jobset.sigs.k8s.io/jobset-name"
        return [pod for pod in self.pods.values() if pod["metadata"]["labels"][label] == name]

    @staticmethod
    def _holds(found: Json, *kinds: str) -> bool:
        return any(c["type"] in kinds and c["status"] == "True" for c in found["status"]["conditions"])


class Server:
    """The cluster's API at a port of this machine."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        handler = type("Handler", (_Handler,), {"cluster": self.cluster})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def write_config(self, path: Path) -> Path:
        """Write a kubeconfig that leads here; returns its path."""
        path.write_text(
            "{apiVersion: v1, kind: Config, current-context: a, users: [{name: u, user: {}}],\n"
            f"clusters: [{{name: c, cluster: {{server: '{self.url}'}}}}],\n"
            "contexts: [{name: a, context: {cluster: c, user: u}}]}\n"
        )
        return path

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.cluster.close()


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        cluster = self.cluster
        with cluster.lock:
            cluster.requests.append(f"{self.command} {url.path}")
            mine = [f for f in cluster.faults if f[0] == self.command]
            fault = mine[0][1] if mine else ""
            if mine:
                cluster.faults.remove(mine[0])
        if fault == "slow":
            time.sleep(1.0)
        try:
            if fault.isdigit():
                raise Refused(int(fault), "the server is currently unable to handle the request")
            with cluster.lock:
                code, said = 200, self._do(unquote(url.path).strip("/").split("/"), query, body)
        except Refused as refused:
            code = refused.code
            said = {"kind": "Status", "code": code, "message": refused.message}
        if fault == "lost":
            self.close_connection = True
            return
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client has gone

    do_GET = do_POST = do_DELETE = _answer

    def _do(self, path: list[str], query: dict[str, str], body: Json) -> Any:
        if path[0] == "apis":
            return self._custom(path[5], path[6] if len(path) > 6 else "", body)
        cluster = self.cluster
        if path[4] == "events":
            return {"items": cluster.events}
        if path[-1] == "log":
            if path[5] not in cluster.pods:
                raise Refused(404, "no pod")
            lines = cluster.outputs.get(path[5], b"").splitlines(keepends=True)
            return b"".join(lines[-int(query.get("tailLines", 10**6)) :])
        owner = query["labelSelector"].partition("=")[2]
        if self.command == "DELETE":
            grace = body.get("gracePeriodSeconds", query.get("gracePeriodSeconds", 30))
            cluster.end_pods(owner, float(grace))
            return {}
        return {"items": cluster.pods_of(owner)}

    def _custom(self, plural: str, name: str, body: Json) -> Json:
        if plural == "workloads":
            return {"items": self.cluster.workloads()}
        if not self.cluster.installed:
            raise Refused(404, "the server could not find the requested resource")
        if self.command == "POST":
            return self.cluster.create(body)
        return (self.cluster.delete if self.command == "DELETE" else self.cluster.get)(name)
