"""The known clusters, and the choice of a job's launcher: this machine or a cluster."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny, model_validator

from deploy.launchers.base import Launcher
from deploy.launchers.cluster import ClusterConfig, ClusterLauncher
from deploy.launchers.job_server_client import JobServer
from deploy.launchers.kubernetes import KubernetesLauncher
from deploy.launchers.kubernetes_manifests import KubernetesConfig
from deploy.launchers.local import LocalLauncher
from deploy.launchers.skypilot import SkyPilotConfig, SkyPilotLauncher
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from dpo_core.config import Config

Target = tuple[type[ClusterConfig], Callable[..., ClusterLauncher]]
TARGETS: dict[str, Target] = {
    "kubernetes": (KubernetesConfig, KubernetesLauncher),
    "slurm": (SlurmConfig, SlurmLauncher),
    "skypilot": (SkyPilotConfig, SkyPilotLauncher),
}


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

    def launcher(self, job: str) -> ClusterLauncher:
        """The launcher for the job of this name."""
        _, make = TARGETS[self.on]
        return make(self.settings, job)

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
