"""The known clusters, and the choice of a job's launcher: this machine or a cluster."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pydantic import SerializeAsAny, model_validator

from deploy.launchers.base import Launcher, State
from deploy.launchers.cluster import ClusterConfig
from deploy.launchers.job_server_client import JobServer
from deploy.launchers.kubernetes import KubernetesLauncher
from deploy.launchers.kubernetes_manifests import KubernetesConfig
from deploy.launchers.local import LocalLauncher
from deploy.launchers.skypilot import SkyPilotConfig, SkyPilotLauncher
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from dpo_core.config import Config

Target = tuple[type[ClusterConfig], Callable[..., Any]]
TARGETS: dict[str, Target] = {
    "kubernetes": (KubernetesConfig, KubernetesLauncher),
    "slurm": (SlurmConfig, SlurmLauncher),
    "skypilot": (SkyPilotConfig, SkyPilotLauncher),
}


class ClusterLauncher(Launcher, Protocol):
    """A launcher whose jobs continue if the flow ends."""

    def require_seen(self, folder: Path) -> None:
        """Refuse a folder that the nodes cannot see."""
        ...

    def require_client(self) -> None:
        """Refuse to continue without the commands or credentials of the cluster."""
        ...

    def find(self, work: Path) -> str | None:
        """The handle of this attempt's job; None if it does not exist."""
        ...


class Cluster(Config):
    """A cluster and its settings, as a parameter of a flow."""

    on: str
    """Name of the cluster in `TARGETS`."""
    settings: SerializeAsAny[ClusterConfig]
    """Settings, of the class in `TARGETS`."""

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, values: Any) -> Any:
        """Read settings that are plain JSON with the class of the named cluster."""
        if not isinstance(values, dict):
            return values
        if values.get("on") not in TARGETS:
            raise ValueError(f"there is no cluster {values.get('on')!r}; choose one of {', '.join(TARGETS)}")
        config, _ = TARGETS[values["on"]]
        return values | {"settings": config.model_validate(values.get("settings"))}

    def launcher(self, job: str) -> "RejoiningLauncher":
        """The launcher for the job of this name."""
        _, make = TARGETS[self.on]
        return RejoiningLauncher(lambda attempt: make(self.settings, job, attempt))

    def for_one_rank(self) -> "Cluster":
        """The same cluster for a job of a single rank: one node without GPUs."""
        return self.model_copy(update={"settings": self.settings.model_copy(update={"nodes": 1, "gpus": 0})})

    def check(self, workspace: Path) -> None:
        """Pre-flight check: the nodes see the workspace, and this machine can reach the cluster.

        Raises:
            RecipeError: the check failed.
        """
        launcher = self.launcher("ahead")
        launcher.require_seen(workspace)
        launcher.require_client()


def launcher_of(
    cluster: Cluster | None, job: str, no_grace: threading.Event, server: JobServer | None = None
) -> Launcher:
    """The launcher for a job: the cluster's, or without one this machine's.

    Args:
        job: its name on a cluster.
        no_grace: while it is set, cancelled jobs on this machine get no time to save.
        server: starts jobs of one process on this machine.
    """
    return cluster.launcher(job) if cluster else LocalLauncher(no_grace, server)


class RejoiningLauncher:
    """Rejoins the job of a flow that was lost; if the job failed or stopped, starts the next attempt."""

    def __init__(self, make: Callable[[int], ClusterLauncher]) -> None:
        self._make = make
        self._launcher = make(1)
        self.pause = self._launcher.pause

    def require_seen(self, folder: Path) -> None:
        self._launcher.require_seen(folder)

    def require_client(self) -> None:
        self._launcher.require_client()

    def render(self, job: Path, processes: int) -> str:
        return self._launcher.render(job, processes)

    def submit(self, job: Path, processes: int, work: Path) -> str:
        # The stage that runs the job holds the lock of the work folder.
        count = work / "attempt"
        attempt = int(count.read_text()) if count.exists() else 1
        self._launcher = self._make(attempt)
        previous = self._launcher.find(work)
        if previous and self._launcher.poll(previous) in {State.FAILED, State.STOPPED}:
            self._launcher.cancel(previous)
            attempt += 1
            self._launcher = self._make(attempt)
        count.write_text(str(attempt))
        return self._launcher.submit(job, processes, work)

    def poll(self, handle: str) -> State:
        return self._launcher.poll(handle)

    def why(self, handle: str) -> str:
        return self._launcher.why(handle)

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        self._launcher.cancel(handle, grace)

    def logs(self, handle: str, lines: int = 50) -> str:
        return self._launcher.logs(handle, lines)
