"""Pre-flight checks: reject a recipe whose files, model, cluster or tracking database cannot be used.

They run before a server is started, a run is recorded or a model is loaded.
"""

import importlib.util
import logging
import sqlite3
import tempfile
from pathlib import Path

from deploy.launchers import Cluster
from dpo_core.data.files.read import check_source
from dpo_core.data.tokens.chat_template import check_template
from dpo_core.errors import RecipeError
from dpo_core.evaluation.run_suite import suite_files
from dpo_core.evaluation.safety_classifier import refuse_training_reward
from dpo_core.models.folder import IMAGES_EXTRA, is_denoiser, makes_images
from dpo_core.models.source import check_source_context, locate, read_template
from dpo_core.rewards.ensemble import parts
from dpo_core.rewards.functions import check_reward
from dpo_core.rewards.images import image_rewards
from expectations.drift import load_baseline
from tasks.promotion.model_source import as_folder, resolve
from tasks.recipe.recipe import Recipe
from tasks.runs.recipe import model_names, require_same_recipe, with_models
from tasks.runs.record import find_run, list_runs
from tasks.stages.prepare_denoiser import check_captions
from tasks.stages.prepare_sft import check_demonstrations
from tasks.store.files import open_workspace, require_writable
from tasks.tracking.connection import begin_writing, resolve_uri
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")

_TRACKED = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")


def check_before_run(recipe: Recipe, resume: str | None = None, cluster: Cluster | None = None) -> None:
    """Refuse a recipe whose workspace, cluster, files, reward, model or tracking database cannot be used.

    The checks take seconds, except that a model on the hub is downloaded.

    Raises:
        DpoError: the first fault; nothing was written but the empty workspace.
    """
    workspace = open_workspace(recipe.workspace)
    require_writable(workspace)
    if resume:
        record = find_run(workspace, resume, recipe.name)
        recipe = with_models(recipe, record.models)
        require_same_recipe(workspace, record, recipe)
    for line in recipe.unusual_parameters:
        log.warning("unusual: %s", line)
    if cluster:
        cluster.check(workspace)
    _check_database(resolve_uri(recipe.tracking, workspace), workspace)
    for path in recipe.data.paths:
        check_source(path)
    if recipe.gate.baseline is not None:
        load_baseline(recipe.gate.baseline)
    if recipe.sft.demonstrations is not None:
        check_demonstrations(recipe.sft.demonstrations)
    _check_suites(recipe)
    if recipe.diffusion_sft is not None and recipe.diffusion_sft.captions is not None:
        check_captions(recipe.diffusion_sft.captions)
    if recipe.model.chat_template is not None:
        check_template(read_template(recipe.model.chat_template))
    tracker = Tracker(recipe.tracking, workspace)
    if recipe.diffusion:
        _check_images(recipe)
    images = recipe.diffusion
    if recipe.model.denoiser is None:
        model, _ = as_folder(recipe.model, workspace, tracker)
        source = locate(model)
        require_kind(source, diffusion=recipe.diffusion)
        check_source_context(source, recipe.tokens.max_length)
        images = makes_images(source)
    if recipe.reward.source is not None:
        check_reward(recipe.reward.source, images=images)
    for name in model_names(recipe)[1:]:
        check_source_context(resolve(name, workspace, tracker, verify=False).path, recipe.tokens.max_length)


def _check_images(recipe: Recipe) -> None:
    """Refuse a machine without diffusers, and rewards that read texts."""
    if importlib.util.find_spec("diffusers") is None:
        raise RecipeError("diffusion models need the package diffusers, which is not installed", IMAGES_EXTRA)
    image_rewards(str(recipe.reward.source))


def require_kind(source: Path, *, diffusion: bool) -> None:
    """Refuse a model of another kind than the policies train.

    Raises:
        RecipeError: the policies train a diffusion model and it is none, or the other way round.
    """
    if diffusion and not is_denoiser(source):
        raise RecipeError(
            f"the policies train a diffusion model, and {source} is none",
            "Set model.name to a folder of diffusers, or model.denoiser={} for a new small one",
        )
    if is_denoiser(source) and not diffusion:
        raise RecipeError(
            f"{source} is a diffusion model, and the policies train a language model",
            "Set the policies' method to diffusion, or name a language model in model.name",
        )


def _check_suites(recipe: Recipe) -> None:
    suite_files(recipe.suites)
    classifier, reward = recipe.suites.settings.classifier, recipe.reward.source
    if classifier is not None and reward is not None:
        refuse_training_reward(classifier, [part.source for part in parts(reward)])


def _check_database(uri: str, workspace: Path) -> None:
    """Refuse a local tracking database that cannot be opened or written; MLflow would only wait for it."""
    kind = uri.partition(":")[0].partition("+")[0]
    if kind not in _TRACKED:
        raise RecipeError(
            f"MLflow supports no tracking URI like {uri}",
            f"Set tracking.uri to a URI that begins with one of {', '.join(_TRACKED)}, or leave it out",
        )
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    tracked = [run.run_id for run in list_runs(workspace) if run.mlflow_run_id]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            tempfile.TemporaryFile(dir=path.parent).close()
            if tracked and path == workspace / "mlflow.db":
                log.warning(
                    "the tracking database %s of %d earlier runs is missing or empty: a new one is created, "
                    "without the earlier runs, models and champion",
                    path,
                    len(tracked),
                )
            return
        database = sqlite3.connect(path, timeout=0)
        try:
            begin_writing(database)
            # The check finds inconsistent pages; it cannot check the values.
            messages = [row[0] for row in database.execute("pragma quick_check(20)")]
            faults = [line for text in messages for line in text.splitlines() if not _harmless(line)]
            if faults:
                raise sqlite3.DatabaseError(f"it is damaged: {faults[0]}")
            database.rollback()
        finally:
            database.close()
    except (OSError, sqlite3.Error) as error:
        if "locked" in str(error):  # another run is writing; MLflow waits for its turn
            return
        why = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"the tracking database {path} cannot be used ({why})",
            "Make it writable, restore a copy, or set tracking.uri to another one",
        ) from error


def _harmless(line: str) -> bool:
    """True for lines of SQLite's check that are headings, or pages left unused by a failed write."""
    return line == "ok" or line.startswith("***") or line.endswith("is never used")
