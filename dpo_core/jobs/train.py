"""Job that trains a model with a method of the registry."""

from importlib import import_module
from pathlib import Path
from typing import Any

from dpo_core import trainers
from dpo_core.jobs.start import clear_end_markers
from dpo_core.methods.job import Job
from dpo_core.methods.registry import get
from dpo_core.training.distributed import peak_memory, start_distributed
from dpo_core.training.engine import read_metrics
from dpo_core.training.liveness import LivenessMonitor


def run(job: Job, monitor: LivenessMonitor) -> dict[str, Any] | None:
    """Train and write the model. Every rank calls this; rank 0 returns the result."""
    settings = get(job.method).settings.model_validate(job.settings)
    start_distributed(settings.engine)
    monitor.start(settings.engine.lost_after_seconds, settings.engine.timeout_seconds)
    clear_end_markers(Path(job.work))
    trainer, export = import_module(f"{trainers.__name__}.{job.method}").build(job, settings)
    metrics = trainer.train()
    peak = peak_memory()
    state = trainer.engine.full_state()
    result = None
    if trainer.engine.rank == 0:
        export(state)
        # All lines of the file, so that steps before a resume are included.
        flops = sum(line.get("flops", 0.0) for line in read_metrics(Path(job.work) / "metrics.jsonl"))
        result = {"metrics": metrics, "flops": flops, "peak_memory_bytes": peak}
    trainer.engine.barrier()
    return result


FILE = Job
