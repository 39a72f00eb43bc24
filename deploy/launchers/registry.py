"""Where training jobs run: beside the flow, or on the cluster that the environment names."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from deploy.launchers.base import Launcher, State
from deploy.launchers.cluster import ClusterConfig
from deploy.launchers.kubernetes import KubernetesLauncher
from deploy.launchers.kubernetes_manifests import KubernetesConfig
from deploy.launchers.local import LocalLauncher
from deploy.launchers.skypilot import SkyPilotConfig, SkyPilotLauncher
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from dpo_core.errors import RecipeError

VARIABLE = "DPO_LAUNCH"
"""Set by `dpo launch` for the flow that it starts: {"on": TARGET, "settings": {...}} as JSON."""

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


def chosen(run: str) -> Launcher:
    """The launcher for a run's training job: this machine's, unless the environment names a cluster.

    Raises:
        RecipeError: the variable is not what `dpo launch` sets.
    """
    said = os.environ.get(VARIABLE)
    if not said:
        return LocalLauncher()
    try:
        facts = json.loads(said)
        config, _ = TARGETS[facts["on"]]
        return launcher(facts["on"], config.model_validate(facts["settings"]), run)
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{VARIABLE} cannot be used ({error})", "Start with: dpo launch RECIPE") from error


def check_cluster(workspace: Path) -> None:
    """Refuse a cluster that this machine cannot speak to, or that would not see the workspace.

    Raises:
        RecipeError: it is so.
    """
    place = chosen("ahead")
    if isinstance(place, Rejoining):
        place.require_seen(workspace)
        place.require_client()


def launcher(on: str, config: ClusterConfig, run: str) -> "Rejoining":
    """The launcher of a cluster."""
    _, make = TARGETS[on]
    return Rejoining(lambda attempt: make(config, run, attempt))


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
