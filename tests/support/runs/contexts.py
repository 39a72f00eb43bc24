"""The context of a run whose MLflow run is not opened."""

from pathlib import Path

from tasks.recipe.sections import TrackingConfig
from tasks.signals import Stop
from tasks.stages.base import Context
from tasks.store.store import Store
from tasks.tracking.tracker import Tracker


def make_context(workspace: Path) -> Context:
    """A run called `run` in the workspace."""
    return Context("run", Store(workspace), Tracker(TrackingConfig(), workspace), Stop())
