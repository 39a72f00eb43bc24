"""Reads a `PlannedRun` from a recipe and the artifacts that exist already."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from dpo_core.data.load import load
from dpo_core.data.split import split_table
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.model_check import check_named
from dpo_core.models.config import DenoiserConfig, ModelConfig
from dpo_core.models.denoiser_flops import image_flops
from dpo_core.models.load import load_tokenizer, read_config
from dpo_core.models.source import locate
from tasks.promotion.model_source import as_folder
from tasks.recipe.recipe import Recipe
from tasks.stages.base import StageResult
from tasks.stages.data import GATES, LOAD
from tasks.stages.models import IMPORT
from tasks.stages.planned_denoiser_run import PlannedDenoiserRun
from tasks.stages.planned_run import PlannedRun
from tasks.stages.prepare_denoiser import check_captions
from tasks.store.facts import ImportFacts, LoadFacts, facts_of
from tasks.store.manifest import Manifest
from tasks.tracking.tracker import Tracker


def read_planned_run(recipe: Recipe, stages: Mapping[str, StageResult]) -> PlannedRun:
    """The planned run of a recipe.

    Args:
        stages: results of the stages in a plan; existing artifacts are read.

    Raises:
        ModelError: the run would refuse the model.
    """
    base = stages[IMPORT.name].manifest
    if recipe.diffusion:
        return _of_denoiser(recipe, stages)
    model = ModelConfig(name=str(base.path), trust_remote_code=recipe.model.trust_remote_code)
    if base.planned:
        model = _named(recipe)
    kind = facts_of(stages[LOAD.name].manifest, LoadFacts).kind
    return PlannedRun(
        recipe=recipe,
        config=read_config(model),
        layout=_layout(recipe, base, model),
        tokenise=Tokenise(load_tokenizer(locate(model)), recipe.tokens),
        kind=kind,
        gated=_gated(recipe, stages, kind),
        sampled=_rows(stages, GATES["pairs"].name) if kind == "prompts" else None,
    )


def _of_denoiser(recipe: Recipe, stages: Mapping[str, StageResult]) -> PlannedRun:
    """Without shape and tokenizer; the network is counted without its weights."""
    kind = facts_of(stages[LOAD.name].manifest, LoadFacts).kind
    made = recipe.diffusion_sft
    captioned = (made.made_scenes or 0) if made else 0
    if made and made.captions:
        captioned = pq.read_metadata(check_captions(made.captions)).num_rows
    base = stages[IMPORT.name].manifest
    return PlannedDenoiserRun(
        recipe,
        config=None,
        layout="is a diffusion model",
        tokenise=None,  # type: ignore[arg-type]
        kind=kind,
        gated=_gated(recipe, stages, kind),
        sampled=_rows(stages, GATES["pairs"].name) if kind == "prompts" else None,
        image_flops=image_flops(_denoiser(recipe) if base.planned else base.path),
        captioned=captioned,
    )


def _denoiser(recipe: Recipe) -> Path | DenoiserConfig:
    """The folder of a diffusion model that is not imported yet, or the settings of a new one."""
    if recipe.model.denoiser is not None:
        return recipe.model.denoiser
    return locate(_named(recipe))


def _named(recipe: Recipe) -> ModelConfig:
    """The recipe's model, with the folder of one that was trained here."""
    workspace = Path(recipe.workspace)
    return as_folder(recipe.model, workspace, Tracker(recipe.tracking, workspace))[0]


def _gated(recipe: Recipe, stages: Mapping[str, StageResult], kind: str) -> pd.DataFrame:
    """The rows that the gate left; before it has run, those without a fault."""
    rows = _rows(stages, GATES[kind].name, LOAD.name)
    return _sound(split_table(load(recipe.data), recipe.data)) if rows is None else rows


def _rows(stages: Mapping[str, StageResult], *names: str) -> pd.DataFrame | None:
    """The rows of the first of these stages whose artifact exists; None if none exists."""
    for name in names:
        if name in stages and stages[name].cached:
            return _sound(pd.read_parquet(stages[name].manifest.path / "data.parquet"))
    return None


def _sound(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["fault"] == ""]


def _layout(recipe: Recipe, base: Manifest, model: ModelConfig) -> str:
    """`packed: why` or `padded: why`, from the imported model or, if it is not imported yet, from a check.

    Raises:
        ModelError: the run would refuse the model.
    """
    if not base.planned:
        facts = facts_of(base, ImportFacts)
        return f"{facts.layout}: {facts.reason}"
    longest, precision = recipe.tokens.max_length, recipe.precision
    check = check_named(model, precision=precision, longest=longest)
    check.require()
    return f"{check.layout}: {check.reason}"
