"""Job that converts a model to a checkpoint folder, and checks how it can be trained."""

from pathlib import Path
from typing import Any

from dpo_core.jobs.files import ImportJob
from dpo_core.jobs.start import start_ranks
from dpo_core.model_check import check_folder
from dpo_core.models.load import config_in, convert
from dpo_core.models.source import check_context
from dpo_core.training.liveness import LivenessMonitor

FILE = ImportJob


def run(job: ImportJob, monitor: LivenessMonitor) -> dict[str, Any] | None:
    """Rank 0 writes the folder and returns how the model can be trained (`model_check.ModelCheck`).

    Raises:
        ModelError: the model cannot be read, or can be trained neither packed nor padded.
    """
    ranks = start_ranks(Path(job.work), job.ranks, monitor)
    if ranks.rank != 0:
        return None
    out = Path(job.out)
    convert(job.model, out)
    ranks.advance(1)
    if job.longest is None:
        return {}
    check_context(config_in(out), job.longest)
    # Check the written folder, which also shows that it can be loaded.
    check = check_folder(out, precision=job.precision, longest=job.longest)
    check.require()
    return dict(vars(check))
