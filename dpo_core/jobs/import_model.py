"""Job that converts a model to a checkpoint folder, and checks how it can be trained."""

from pathlib import Path
from typing import Any

from dpo_core.jobs.files import ImportJob
from dpo_core.model_check import check_folder
from dpo_core.models.load import config_in, convert
from dpo_core.models.source import check_context
from dpo_core.ranks import JobRanks

FILE = ImportJob


def run(job: ImportJob, ranks: JobRanks) -> dict[str, Any]:
    """Write the folder, and return how the model can be trained (`model_check.ModelCheck`).

    Raises:
        ModelError: the model cannot be read, or can be trained neither packed nor padded.
    """
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
