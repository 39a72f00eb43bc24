"""Training as a managed job of SkyPilot, on whatever cloud or cluster has room, through its command `sky`.

SkyPilot pins packages that this project needs in other versions: install it in an environment of its own and
put its `sky` on PATH. Facts are those of version 0.14.
"""

import json
import logging
import shlex
import subprocess
import time
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from filelock import FileLock
from pydantic import Field, field_validator

from deploy.launchers import torchrun
from deploy.launchers.base import LOG, State, clear, ended, tail
from deploy.launchers.cluster import ClusterConfig, Handle, job_name, require_command, require_seen
from dpo_core.errors import RecipeError, StageFailed

log = logging.getLogger("dpo")

TIMEOUT = 300.0
"""Seconds that one command may take: the first starts SkyPilot's own server."""
INSTALL = "Install SkyPilot in an environment of its own (uv tool install skypilot) and put it on PATH"
AWAY = 600.0
"""Seconds that its server or controller may be away."""
_PORT = 8008
_ENDS = {
    "CANCELLED": "cancelled",
    "FAILED": "its command failed",
    "FAILED_SETUP": "its setup failed",
    "FAILED_PRECHECKS": "no cloud can be asked for it",
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
    """A training job through SkyPilot."""

    bucket: str
    """Bucket that holds the workspace, such as s3://NAME or gs://NAME."""
    mount: str
    """Where the bucket is mounted, on the machines and on that of the flow."""
    accelerator: str = "H100"
    """Kind of GPU; `gpus` says how many a node."""
    infra: str | None = None
    """Cloud, region or cluster, such as aws/us-east-1 or k8s; the cheapest when empty."""
    image: str | None = None
    """Image with this package; without one, `setup` installs it."""
    setup: str = ""
    """Shell lines before the first start on a machine."""
    spot: bool = False
    """Machines that may be taken away, and are replaced when they are."""
    max_hourly_cost: float | None = Field(None, gt=0)
    """Refuse machines that cost more, in dollars an hour."""
    restarts: int = Field(3, ge=0)
    """How often a job that failed by itself is started again. Lost machines do not count."""
    secrets: list[str] = Field([])
    """Names of variables here whose values go to the machines; SkyPilot does not show them."""

    @field_validator("mount")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not PurePosixPath(path).is_absolute() or path == "/":
            raise ValueError("the mount is an absolute path, not the root")
        return path


class SkyPilotLauncher:
    """One attempt at a run. Any process of the same user finds its job again by run and attempt."""

    pause = 30.0

    def __init__(self, config: SkyPilotConfig, run: str, attempt: int = 1) -> None:
        self.config, self.name = config, job_name(run, attempt)

    def render(self, job: Path, processes: int) -> str:
        """The task file."""
        self.config.check(processes)
        return yaml.safe_dump(_task(self.config, self.name, job.absolute(), processes), sort_keys=False)

    def require_seen(self, folder: Path) -> None:
        """Refuse a folder that does not lie in the bucket."""
        require_seen(folder, self.config.mount, "in the bucket, which machines see")

    def require_client(self) -> None:
        """Refuse to go on without the command of SkyPilot."""
        require_command("sky", INSTALL)

    def find(self, work: Path) -> str | None:
        """The handle of the job of this run and attempt, None where there is none."""
        ids = [row["job_id"] for row in _queue() if row["job_name"] == self.name]
        return str(Handle(str(max(ids)), work)) if ids else None

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Hand the job to SkyPilot, or find the one that an earlier call handed over.

        Raises:
            RecipeError: the job does not lie in the bucket, or `sky` is missing.
            StageFailed: SkyPilot refuses it.
        """
        work = work.absolute()
        self.require_seen(job)
        task = work / f"{self.name}.yaml"
        # SkyPilot takes two jobs of one name.
        with FileLock(work / f"{self.name}.lock"):
            found = self.find(work)
            if found:
                return found
            clear(work)
            task.write_text(self.render(job, processes))
            secrets = [part for name in self.config.secrets for part in ("--secret", name)]
            options = ("--name", self.name, "--detach-run", "--yes", *secrets)
            try:
                _sky("jobs", "launch", *options, str(task))
            except StageFailed as error:
                # The answer may be lost and the job there.
                found = self.find(work)
                if found is None:
                    raise StageFailed(error.problem, "Change what it names, or try again later") from error
            return found or self.find(work) or _vanished(self.name)

    def poll(self, handle: str) -> State:
        number, work = Handle.parse(handle)
        status = (_row(number) or {}).get("status", "")
        if status and status not in _ENDS:
            return State.RUNNING
        self._keep_log(number, work)
        return ended(work)

    def why(self, handle: str) -> str:
        row = _row(Handle.parse(handle).id)
        if row is None:
            return "SkyPilot does not know the job any more"
        words = _ENDS.get(row["status"]) or _WAITS.get(row["status"], "")
        reason = " ".join((row.get("failure_reason") or row.get("details") or "").split())
        return f"{words}: {reason}" if words and reason else words

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Have SkyPilot stop the job and give the machines back once the bucket holds what was saved."""
        number, _ = Handle.parse(handle)
        if self.poll(handle) is not State.RUNNING:
            return
        timeout = f"--graceful-timeout={max(1, round(grace))}"
        _sky("jobs", "cancel", "--yes", "--graceful", timeout, number)
        limit = time.monotonic() + grace + TIMEOUT
        while self.poll(handle) is State.RUNNING:
            if time.monotonic() > limit:
                log.warning("job %s of SkyPilot does not end; look at it with: sky jobs queue", number)
                return
            time.sleep(1.0)

    def logs(self, handle: str, lines: int = 50) -> str:
        number, work = Handle.parse(handle)
        return tail(work, lines) or "\n".join(_log(number).splitlines()[-lines:])

    def _keep_log(self, number: str, work: Path) -> None:
        """Once the job is over: its machines are given back, and its log with them."""
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
        # Checkpoints are renamed and read back, which a plain mount of a bucket does not do.
        "file_mounts": {config.mount: {"source": config.bucket, "mode": "MOUNT_CACHED"}},
        "envs": torchrun.NODE_ENVIRONMENT | config.environment,
    }
    if config.setup:
        task["setup"] = config.setup
    return task | {"run": run}


def _sky(*arguments: str) -> str:
    """Run `sky`.

    Raises:
        RecipeError: it is not installed.
        StageFailed: it fails or does not answer.
    """
    try:
        done = subprocess.run(
            ["sky", *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise RecipeError("there is no command sky on this machine", INSTALL) from error
    except subprocess.TimeoutExpired as error:
        raise StageFailed(f"sky has not answered for {TIMEOUT:g} s", "Try again later") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-600:]
        raise StageFailed(f"sky {' '.join(arguments[:2])}: {said}", "Try again later")
    return done.stdout


def _queue() -> list[dict[str, Any]]:
    """All managed jobs of this user, waited for while SkyPilot is away: they go on meanwhile.

    Raises:
        StageFailed: it stays away.
    """
    limit, pause = time.monotonic() + AWAY, 0.5
    while True:
        try:
            return json.loads(_sky("jobs", "queue", "--all", "--output", "json"))
        except StageFailed as error:
            problem = error.problem
        except ValueError as error:
            problem = f"what it lists is no JSON ({error})"
        if time.monotonic() + pause > limit:
            raise StageFailed(
                f"SkyPilot has not answered for {AWAY:g} s ({problem})",
                "The job may go on; resume the run when it is back",
            )
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def _row(number: str) -> dict[str, Any] | None:
    return next((row for row in _queue() if str(row["job_id"]) == number), None)


def _log(number: str) -> str:
    try:
        return _sky("jobs", "logs", "--no-follow", number)
    except StageFailed as error:
        return f"{error.problem}\n"


def _vanished(name: str) -> str:
    raise StageFailed(f"SkyPilot took the job {name} and does not list it", "Look at: sky jobs queue --all")
