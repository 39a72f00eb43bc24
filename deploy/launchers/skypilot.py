"""The launcher for SkyPilot: runs a job as a managed job on any cloud or cluster, by the command `sky`.

SkyPilot pins packages that this project needs in other versions, so install it in its own environment and put
`sky` on PATH. Written for version 0.14.
"""

import json
import logging
import shlex
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from deploy.launchers import cluster, torchrun
from deploy.launchers.base import LOG, State, final_state, tail
from deploy.launchers.cluster import (
    ClusterConfig,
    ClusterLauncher,
    Handle,
    MountPath,
    require_command,
    require_seen,
)
from dpo_core.errors import StageFailed

log = logging.getLogger("dpo")

TIMEOUT = 300.0
"""Maximum seconds of one command; the first one starts SkyPilot's server."""
INSTALL = "Install SkyPilot in its own environment (uv tool install skypilot) and put sky on PATH"
_PORT = 8008
_ENDS = {
    "CANCELLED": "cancelled",
    "FAILED": "its command failed",
    "FAILED_SETUP": "its setup failed",
    "FAILED_PRECHECKS": "no cloud passed SkyPilot's checks",
    "FAILED_NO_RESOURCE": "no cloud has room or quota for it",
    "FAILED_CONTROLLER": "SkyPilot's controller failed",
    "SUCCEEDED": "",
}
_WAITS = {
    "PENDING": "waiting for the controller",
    "STARTING": "looking for machines",
    "RECOVERING": "its machines were preempted or lost; looking for others",
}


class SkyPilotConfig(ClusterConfig):
    """Settings of jobs that SkyPilot runs."""

    bucket: str
    """Bucket that holds the workspace, such as s3://NAME or gs://NAME."""
    mount: MountPath
    """Path at which the bucket is mounted, on the nodes and on the flow's machine."""
    accelerator: str = "H100"
    """Kind of GPU; `gpus` is their number per node."""
    infra: str | None = None
    """Cloud, region or cluster, such as aws/us-east-1 or k8s; empty: the cheapest."""
    image: str | None = None
    """Image with this package; empty: `setup` must install it."""
    setup: str = ""
    """Shell lines that run once on each new machine."""
    spot: bool = False
    """Use spot machines, which the cloud may reclaim; SkyPilot replaces them."""
    max_hourly_cost: float | None = Field(None, gt=0)
    """Refuse machines that cost more, in dollars per hour."""
    restarts: int = Field(3, ge=0)
    """How often a job that failed restarts. Lost machines do not count."""
    secrets: list[str] = Field([])
    """Names of environment variables of this machine to pass on; SkyPilot hides their values."""


class SkyPilotLauncher(ClusterLauncher):
    """Launches a job by `sky jobs launch`."""

    pause = 30.0
    config: SkyPilotConfig

    def render(self, job: Path, processes: int) -> str:
        self.config.check(processes)
        return self._task(job.absolute(), processes)

    def _task(self, job: Path, processes: int) -> str:
        return yaml.safe_dump(_task(self.config, self.name, job, processes), sort_keys=False)

    def require_seen(self, folder: Path) -> None:
        require_seen(folder, self.config.mount, "in the bucket that the nodes mount")

    def require_client(self) -> None:
        require_command("sky", INSTALL)

    def find(self, work: Path) -> str | None:
        ids = [row["job_id"] for row in _queue() if row["job_name"] == self.name]
        return str(Handle(str(max(ids)), work)) if ids else None

    def start(self, job: Path, processes: int, work: Path) -> None:
        task = work / f"{self.name}.yaml"
        task.write_text(self._task(job, processes))
        secrets = [part for name in self.config.secrets for part in ("--secret", name)]
        _sky("jobs", "launch", "--name", self.name, "--detach-run", "--yes", *secrets, str(task))

    def poll(self, handle: str) -> State:
        number, work = Handle.parse(handle)
        status = (_row(number) or {}).get("status", "")
        if status and status not in _ENDS:
            return State.RUNNING
        self._keep_log(number, work)
        return final_state(work)

    def why(self, handle: str) -> str:
        row = _row(Handle.parse(handle).id)
        if row is None:
            return "SkyPilot does not know the job any more"
        status = _ENDS.get(row["status"]) or _WAITS.get(row["status"], "")
        details = " ".join((row.get("failure_reason") or row.get("details") or "").split())
        return f"{status}: {details}" if status and details else status

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Have SkyPilot stop the job, upload what it saved, and release the machines."""
        number, _ = Handle.parse(handle)
        if self.poll(handle) is not State.RUNNING:
            return
        timeout = f"--graceful-timeout={max(1, round(grace))}"
        _sky("jobs", "cancel", "--yes", "--graceful", timeout, number)
        limit = time.monotonic() + grace + TIMEOUT
        while self.poll(handle) is State.RUNNING:
            if time.monotonic() > limit:
                log.warning("SkyPilot's job %s does not end; check it with: sky jobs queue", number)
                return
            time.sleep(1.0)

    def logs(self, handle: str, lines: int = 50) -> str:
        number, work = Handle.parse(handle)
        return tail(work, lines) or "\n".join(_log(number).splitlines()[-lines:])

    def _keep_log(self, number: str, work: Path) -> None:
        """Save the log once the job has ended, because it is lost with the machines."""
        kept = work / f"{self.name}.log-kept"
        if not kept.exists():
            with (work / LOG).open("a") as file:
                file.write(_log(number))
            kept.touch()


def _task(config: SkyPilotConfig, name: str, job: Path, processes: int) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "infra": config.infra,
        "accelerators": f"{config.accelerator}:{config.gpus}" if config.gpus else None,
        "cpus": f"{config.cpus}+" if config.cpus else None,
        "memory": f"{config.memory_gib}+" if config.memory_gib else None,
        "use_spot": config.spot or None,
        "max_hourly_cost": config.max_hourly_cost,
        "image_id": f"docker:{config.image}" if config.image else None,
        "job_recovery": {"max_restarts_on_errors": config.restarts},
    }
    start = torchrun.node_command(job, python=config.python)
    meeting = (
        f'--nnodes="$SKYPILOT_NUM_NODES" --nproc-per-node={processes} --node-rank="$SKYPILOT_NODE_RANK" '
        f'--master-addr="$HEAD" --master-port={_PORT}'
    )
    limit = f"timeout --signal=TERM --kill-after=120 {int(config.hours * 3600)} " if config.hours else ""
    run = (
        'HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
        f"exec {limit}{shlex.join(start[:3])} {meeting} {shlex.join(start[3:])}\n"
    )
    task: dict[str, Any] = {
        "name": name,
        "num_nodes": config.nodes,
        "resources": {key: value for key, value in resources.items() if value is not None},
        # MOUNT_CACHED, because a plain mount can neither rename checkpoints nor read them back.
        "file_mounts": {config.mount: {"source": config.bucket, "mode": "MOUNT_CACHED"}},
        "envs": torchrun.NODE_ENVIRONMENT | config.environment,
    }
    if config.setup:
        task["setup"] = config.setup
    return task | {"run": run}


def _sky(*arguments: str) -> str:
    """The output of `sky`."""
    return cluster.run_command("sky", *arguments, remedy=INSTALL, timeout=TIMEOUT).stdout


def _queue() -> list[dict[str, Any]]:
    """All managed jobs of this user."""

    def ask() -> list[dict[str, Any]]:
        try:
            return json.loads(_sky("jobs", "queue", "--all", "--output", "json"))
        except ValueError as error:
            raise StageFailed(f"its answer is not JSON ({error})", "Try again later") from error

    return cluster.patiently("SkyPilot", ask)


def _row(number: str) -> dict[str, Any] | None:
    return next((row for row in _queue() if str(row["job_id"]) == number), None)


def _log(number: str) -> str:
    try:
        return _sky("jobs", "logs", "--no-follow", number)
    except StageFailed as error:
        return f"{error.problem}\n"
