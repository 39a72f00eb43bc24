"""Job that converts a model to a checkpoint folder, and checks how it can be trained."""

import shutil
from pathlib import Path
from typing import Any

from dpo_core.jobs.files import ImportJob
from dpo_core.model_check import check_folder
from dpo_core.models.config import ModelConfig
from dpo_core.models.denoiser import load_denoiser
from dpo_core.models.folder import PICKLED, is_denoiser
from dpo_core.models.load import config_in, convert
from dpo_core.models.scene_denoiser import make_scene_denoiser
from dpo_core.models.source import check_context, locate
from dpo_core.ranks import JobRanks

FILE = ImportJob


def run(job: ImportJob, ranks: JobRanks) -> dict[str, Any]:
    """Write the folder, and return how the model can be trained (`model_check.ModelCheck`).

    Raises:
        ModelError: the model cannot be read, or can be trained neither packed nor padded.
    """
    out = Path(job.out)
    if _import_denoiser(job.model, out):
        ranks.advance(1)
        reason = "a diffusion model, trained on denoising errors of whole images"
        return {"layout": "images", "reason": reason, "sampling": "denoising"}
    convert(job.model, out)
    ranks.advance(1)
    if job.longest is None:
        return {}
    check_context(config_in(out), job.longest)
    # Check the written folder, which also shows that it can be loaded.
    check = check_folder(out, precision=job.precision, longest=job.longest)
    check.require()
    return dict(vars(check))


def _import_denoiser(config: ModelConfig, out: Path) -> bool:
    """Write the folder of a diffusion model, and load it to check it; False for a language model."""
    if config.denoiser is not None:
        make_scene_denoiser(out, config.denoiser)
    elif (source := locate(config)).is_dir() and is_denoiser(source):
        left_out = shutil.ignore_patterns(*PICKLED, ".*", "metrics.jsonl")
        shutil.copytree(source, out, ignore=left_out, dirs_exist_ok=True)
    else:
        return False
    load_denoiser(out)
    return True
