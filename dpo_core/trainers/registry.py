"""Builds the trainer of a job by the name of its method."""

from importlib import import_module
from typing import Any

from dpo_core.methods.job import Job
from dpo_core.trainers.common import Export


def build(job: Job, settings: Any) -> tuple[Any, Export]:
    """The trainer of a job, and the function that writes the trained model.

    Args:
        settings: a value of the settings class of the job's method.
    """
    trainer, export = import_module(f"dpo_core.trainers.{job.method}").build(job, settings)
    return trainer, export
