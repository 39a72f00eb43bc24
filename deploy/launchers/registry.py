"""Where jobs run: beside the flow, or on a cluster."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pydantic import SerializeAsAny, model_validator

from deploy.launchers.base import Launcher, State
from deploy.launchers.cluster import ClusterConfig
from deploy.launchers.kubernetes import KubernetesLauncher
from deploy.launchers.kubernetes_manifests import KubernetesConfig
from deploy.launchers.local import LocalLauncher
from deploy.launchers.skypilot import SkyPilotConfig, SkyPilotLauncher
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from deploy.launchers.warm import JobServer
from dpo_core.config import Config

Target = tuple[type[ClusterConfig], Callable[..., Any]]
TARGETS: dict[str, Target] = {
    "kubernetes": (KubernetesConfig, KubernetesLauncher),
    "slurm": (SlurmConfig, SlurmLauncher),
    "skypilot": (SkyPilotConfig, SkyPilotLauncher),
}


class ClusterLauncher(Launcher, Protocol):
    """A launcher whose jobs outlive their watcher."""

    def require_seen(self, folder: Path) -> None:
        """Refuse a folder that the nodes would not see."""
        ...

    def require_client(self) -> None:
        """Refuse to go on without what this machine needs to speak to the cluster."""
        ...

    def find(self, work: Path) -> str | None:
        """The handle of the job of its run and attempt, None where there is none."""
        ...


class Cluster(Config):
    """A cluster that runs jobs; plain data, so that it can be a parameter of a flow."""

    on: str
    """Its name in `TARGETS`."""
    settings: SerializeAsAny[ClusterConfig]
    """Its settings, of the class that `TARGETS` names."""

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, values: Any) -> Any:
        """Settings as JSON become those of the named target."""
        if not isinstance(values, dict):
            return values
        if values.get("on") not in TARGETS:
            raise ValueError(f"there is no cluster {values.get('on')!r}; known are {', '.join(TARGETS)}")
        config, _ = TARGETS[values["on"]]
        return values | {"settings": config.model_validate(values.get("settings"))}

    def launcher(self, job: str) -> "Rejoining":
        """The launcher for a job, which has this name on the cluster."""
        _, make = TARGETS[self.on]
        return Rejoining(lambda attempt: make(self.settings, job, attempt))

    def for_one_rank(self) -> "Cluster":
        """The same cluster for a job of a single rank: one node without GPUs."""
        return self.model_copy(update={"settings": self.settings.model_copy(update={"nodes": 1, "gpus": 0})})

    def check(self, workspace: Path) -> None:
        """Pre-flight check: this machine can speak to the cluster, whose nodes see the workspace.

        Raises:
            RecipeError: it cannot, or they do not.
        """
        launcher = self.launcher("ahead")
        launcher.require_seen(workspace)
        launcher.require_client()


def launcher_of(
    cluster: Cluster | None, job: str, hurry: threading.Event, server: JobServer | None = None
) -> Launcher:
    """The launcher for a job: the cluster's, else this machine's.

    Args:
        job: its name on a cluster.
        hurry: while it is set, jobs on this machine that are cancelled get no time to save.
        server: starts jobs of one process on this machine.
    """
    return cluster.launcher(job) if cluster else LocalLauncher(hurry, server)


class Rejoining:
    """Goes on with the job that a lost watcher left; after one that ended badly, begins the next attempt."""

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
        # In the work folder, which is as old as the run's state, and is locked by whoever runs the stage.
        count = work / "attempt"
        attempt = int(count.read_text()) if count.exists() else 1
        self._launcher = self._make(attempt)
        left = self._launcher.find(work)
        if left and self._launcher.poll(left) in {State.FAILED, State.STOPPED}:
            self._launcher.cancel(left)
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
