"""Loads what commands, jobs and tests load, in the process that `forked` forks; imported by nothing else."""

import gc
import importlib

from dpo_core import job_server
from flows.process.environment import keep_quiet

keep_quiet()
job_server._load()
_LIBRARIES = (
    "flows.commands.run",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking.fluent",
    "prefect.workers.process",
    "tasks.promotion.promote",
    "tasks.reports.html",
    "tasks.stages.registry",
    # Of the tests themselves.
    "hypothesis",
    "scipy.stats",
)
for _name in _LIBRARIES:
    importlib.import_module(_name)
gc.collect()
gc.freeze()
