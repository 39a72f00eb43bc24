"""How a training job is started, watched and stopped, wherever it runs."""

from deploy.launchers.base import Launcher, State
from deploy.launchers.local import LocalLauncher
from deploy.launchers.registry import chosen

__all__ = ["Launcher", "LocalLauncher", "State", "chosen"]
