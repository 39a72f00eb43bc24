"""Prepares the reference of diffusion policies: training of the model on captioned images."""

from pathlib import Path

import pyarrow.parquet as pq

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import DataError
from dpo_core.jobs.files import SceneCaptionsJob
from dpo_core.methods.diffusion_sft import METHOD, DiffusionSftConfig
from dpo_core.system import digest_file
from tasks.stages.base import Context, Output, RunningStage, StageResult, run_stage, stage_task
from tasks.stages.job import common_fields, run_model_job
from tasks.stages.prepare_sft import SFT
from tasks.stages.training_job import TrainingSetup, key_settings_of, train
from tasks.store.manifest import Manifest

_COLUMNS = {"id", "prompt", "image"}


@stage_task(SFT.name)
def prepare_denoiser(context: Context, base: Manifest, config: DiffusionSftConfig, seed: int) -> StageResult:
    """Make the reference: train a diffusion model on captioned images of a file, or on self-made ones."""
    source = f"file:{digest_file(check_captions(config.captions))}" if config.captions else "made"

    def compute(running: RunningStage) -> Output:
        captions = Path(config.captions or _make_captions(running, config, seed)).expanduser().absolute()
        count = pq.read_metadata(captions).num_rows
        return train(running, setup, {"model": str(base.path), "data": str(captions)}, count)

    setup = TrainingSetup(METHOD, config, TokenConfig(), seed)
    return run_stage(context, SFT, {"base": base}, key_settings_of(setup) | {"source": source}, compute)


def _make_captions(running: RunningStage, config: DiffusionSftConfig, seed: int) -> Path:
    """The self-made images, which a resumed stage finds made."""
    folder = running.scratch / "captions"
    if not (folder / "captions.parquet").is_file():
        fields = common_fields(running) | {"work": str(folder), "out": str(folder)}
        count = config.made_scenes or 0
        job = SceneCaptionsJob(**fields, count=count, wrong=config.wrong, seed=seed)
        run_model_job(running, job, unit="images")
    return folder / "captions.parquet"


def check_captions(path: str) -> Path:
    """The path of a file of captioned images.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    place = Path(path).expanduser()
    try:
        columns = set(pq.read_schema(place).names)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no parquet file that can be read ({error})", "Check its path") from error
    if missing := sorted(_COLUMNS - columns):
        raise DataError(
            f"{path} has no column {missing[0]}",
            "Captioned images have the columns id, prompt and image (the bytes of PNG or JPEG files)",
        )
    return place
