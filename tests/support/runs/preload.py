"""Loads what commands and jobs load, in the process that `forked` forks; imported by nothing else."""

import gc
import importlib

from dpo_core import job_server
from flows.process.environment import keep_quiet

keep_quiet()
job_server._load()
for _name in ("flows.commands.run", "tasks.stages.registry"):
    importlib.import_module(_name)
gc.collect()
gc.freeze()
