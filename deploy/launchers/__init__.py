"""Launchers: start, watch and stop a job on this machine, Kubernetes, SLURM or SkyPilot."""

from deploy.launchers.base import Launcher, State
from deploy.launchers.local import LocalLauncher
from deploy.launchers.registry import Cluster, launcher_of

__all__ = ["Cluster", "Launcher", "LocalLauncher", "State", "launcher_of"]
