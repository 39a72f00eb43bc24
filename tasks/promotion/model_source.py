"""Resolves the names of trained models (`models:/…`, `runs:/…`) to checkpoint folders.

    models:/NAME@ALIAS     the registered version with the alias
    models:/NAME/VERSION   a registered version
    runs:/RUN              the model that a run of the workspace registered; RUN is a name in `dpo runs`, or
                           `latest`: the newest finished run of any recipe
    runs:/RUN/POLICY       a policy of the run; case does not matter

Aliases and `latest` move. A run therefore records at its start which version or policy they name
(`RunRecord.models`), and a resume uses the recorded one.
"""

import logging
import re
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.models.config import ModelConfig
from dpo_core.models.folder import is_denoiser
from dpo_core.models.source import weights_digest
from dpo_core.redaction import redact
from tasks.promotion.finished_run import database_gone, newest_report, read_report, registry_of
from tasks.promotion.ledger import ALIAS, champion_of, registered_models
from tasks.recipe.policies import is_external
from tasks.recipe.sections import TrackingConfig
from tasks.reports.run_report import RunReport
from tasks.store.facts import ModelFacts, Origin
from tasks.store.files import path_of
from tasks.store.manifest import Manifest, digest_folder
from tasks.store.store import Store
from tasks.tracking.connection import all_pages
from tasks.tracking.registry import numbered, version_of
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")
MODELS, RUNS, LATEST = "models:/", "runs:/", "latest"
FORMS = "Write models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN or runs:/RUN/POLICY"


class TrainedModel(NamedTuple):
    """A trained model whose files are on this machine."""

    origin: Origin
    path: Path
    """The checkpoint folder."""

    @property
    def manifest(self) -> Manifest:
        """The model as a manifest, the form in which stages exchange it."""
        return Manifest(
            kind="model",
            uri=self.path.as_uri(),
            sha256=self.origin.sha256,
            schema_version=1,
            stage="trained-model",
            stage_version=1,
            config_digest=self.origin.sha256,
            extra=ModelFacts(weights_sha256=weights_digest(self.path)).as_extra(),
        )


def resolve(
    name: str, workspace: Path, tracker: Tracker | None = None, *, verify: bool = True
) -> TrainedModel:
    """The trained model of that name. Changes nothing.

    Args:
        name: one of the forms above.
        tracker: the MLflow registry to search; None: the one that the runs of the workspace wrote to.
        verify: compare the files with their digest, which reads all of them.

    Raises:
        RecipeError: the model, version, alias, run or policy does not exist; or its files are not on this
            machine, are damaged, or hold a reward model.
        StageFailed: MLflow does not answer.
    """
    if name.startswith(RUNS):
        model = _of_run(name, workspace)
    else:
        model = _registered(name, tracker or _registry(workspace))
    if verify:
        require_intact(model.path, model.origin.sha256, model.origin.title)
    return model


def pinned_name(name: str, workspace: Path, tracker: Tracker) -> str:
    """The permanent name of the model that `name` refers to now. Raises as `resolve`."""
    return resolve(name, workspace, tracker, verify=False).origin.name if is_external(name) else name


def as_folder(
    config: ModelConfig, workspace: Path, tracker: Tracker | None = None, *, verify: bool = False
) -> tuple[ModelConfig, Origin | None]:
    """The settings with a trained model's checkpoint folder in place of its name, and the model's origin.
    For other models: the settings unchanged, and None. Raises as `resolve`."""
    if not is_external(config.name):
        return config, None
    if config.revision is not None:
        raise RecipeError(
            f"model.revision has no effect, because {config.name} is not a model of the hub",
            "Remove model.revision; models:/NAME/VERSION names a version",
        )
    model = resolve(config.name, workspace, tracker, verify=verify)
    return config.model_copy(update={"name": str(model.path)}), model.origin


class Champion(NamedTuple):
    """A registered version with the alias `champion`, whose files are on this machine."""

    title: str
    """`dpo-demo version 3`."""
    manifest: Manifest


def find_champion(tracker: Tracker, registered: str) -> Champion | None:
    """The champion of a registered model; None where there is none, or its files are not on this machine."""
    version = champion_of(tracker, registered)
    if version is None:
        return None
    title = version_title(version)
    if weights_of(version) is None or not version.tags.get("dpo.artifact_sha256"):
        log.warning(
            "the files of the champion %s are not on this machine; the run is compared with its reference",
            title,
        )
        return None
    model = model_of_version(tracker, version)
    require_intact(model.path, model.origin.sha256, f"the champion {title}")
    return Champion(title, model.manifest)


# The registry -----------------------------------------------------------------------------------------------


def _registered(name: str, tracker: Tracker) -> TrainedModel:
    model, mark, chosen = re.fullmatch(r"models:/([^/@]*)([/@]?)(.*)", name).groups()  # type: ignore[union-attr]
    if not model or not chosen or "/" in chosen:
        raise RecipeError(f"{name} is not the name of a registered version", FORMS)
    version = None
    if database_gone(tracker.uri):  # MLflow would create it
        pass
    elif mark == "@" and chosen == ALIAS:
        version = champion_of(tracker, model)
    elif mark == "@":
        version = version_of(tracker, model, chosen)
    else:
        version = numbered(tracker, model, chosen)
    if version is None:
        raise _unknown(tracker, model, mark, chosen)
    return model_of_version(tracker, version, chosen if mark == "@" else None)


def _registry(workspace: Path) -> Tracker:
    with suppress(RecipeError):  # the workspace has no finished run
        return registry_of(workspace)
    return Tracker(TrackingConfig(), workspace)


def model_of_version(tracker: Tracker, version: Any, alias: str | None = None) -> TrainedModel:
    """The trained model of a registered version.

    Args:
        alias: the alias that named the version, for the title.

    Raises:
        RecipeError: its files are not on this machine, or are not a language model.
    """
    title = version_title(version)
    run = _trained_by(tracker, version.run_id) if version.run_id else None
    folder, sha256 = weights_of(version), version.tags.get("dpo.artifact_sha256")
    place = version.tags.get("dpo.weights_uri", "")
    if "/objects/reward-model/" in place:
        raise RecipeError(f"{title} is a reward model", "Name a language model")
    if not place or not sha256:
        raise RecipeError(
            f"{title} was not registered by a run: it lacks the tags dpo.weights_uri and dpo.artifact_sha256",
            "Download the model and give its folder",
        )
    if folder is None:
        again = f"train it again, as in the run {run}" if run else "train it again"
        raise RecipeError(
            f"the files of {title} are not on this machine: {place}",
            f"Use the machine that has them, or {again}",
        )
    origin = Origin(
        name=f"{MODELS}{version.name}/{version.version}",
        title=f"{title} ({alias})" if alias else title,
        sha256=sha256,
        run=run,
    )
    return TrainedModel(origin, folder)


def version_title(version: Any) -> str:
    """The name of a registered version in messages and decisions: `dpo-demo version 3`."""
    return f"{version.name} version {version.version}"


def weights_of(version: Any) -> Path | None:
    """The checkpoint folder of a registered version; None if it is not on this machine."""
    folder = path_of(version.tags.get("dpo.weights_uri", ""))
    return folder if folder and ((folder / "config.json").is_file() or is_denoiser(folder)) else None


def require_intact(folder: Path, sha256: str | None, what: str) -> None:
    """Check that a folder's files have the artifact's digest.

    Raises:
        RecipeError: they differ or cannot be read.
    """
    try:
        intact = sha256 is None or digest_folder(folder) == sha256
    except (OSError, StageFailed):
        intact = False
    if not intact:
        raise RecipeError(
            f"{what} is damaged: the files in {folder} are not those that were stored",
            "Run its recipe again, which rebuilds the files",
        )


def _trained_by(tracker: Tracker, run_id: str) -> str | None:
    """The name of a run in MLflow; None if it was deleted."""

    def read(client: Any) -> str | None:
        try:
            tags = client.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return tags.get("dpo.run") or tags.get("mlflow.runName")

    return tracker.ask(f"the run {run_id}", read)


def _unknown(tracker: Tracker, model: str, mark: str, chosen: str) -> RecipeError:
    """The error for a model, alias or version that does not exist, with the existing ones as the remedy."""
    first = (
        "Start the first run from a base model (--set model.name=…) and promote what it registers: "
        "dpo promote RUN"
    )
    models = {}
    if not database_gone(tracker.uri):
        models = {entry.name: entry for entry in registered_models(tracker)}
    if model not in models:
        problem = f"the registry at {redact(tracker.uri)} has no model {model}"
        remedy = _choices(model, list(models), "Registered models")
        if (mark, chosen) == ("@", ALIAS):
            return RecipeError(f"{problem}, so it has no champion yet", f"{first}. {remedy}")
        return RecipeError(problem, remedy)
    if (mark, chosen) == ("@", ALIAS):
        return RecipeError(f"{model} has no champion yet", first)
    if mark == "@":
        aliases = [str(alias) for alias in models[model].aliases]
        return RecipeError(f"{model} has no alias {chosen}", _choices(chosen, aliases, "Its aliases"))
    registered = tracker.ask(
        f"the versions of {model}",
        lambda client: all_pages(partial(client.search_model_versions, f"name = '{model}'")),
    )
    versions = sorted((str(version.version) for version in registered), key=int)
    return RecipeError(f"{model} has no version {chosen}", _choices(chosen, versions, "Its versions"))


def _choices(word: str, known: list[str], what: str) -> str:
    """`Did you mean dpo-demo? Registered models: dpo-demo, dpo-kto`."""
    near = get_close_matches(word, known, n=1)
    return f"{f'Did you mean {near[0]}? ' if near else ''}{what}: {', '.join(known) or 'none'}"


# Runs -------------------------------------------------------------------------------------------------------


def report_of(name: str, workspace: Path) -> RunReport:
    """The report of the run that `runs:/RUN` or `runs:/RUN/POLICY` names.

    Raises:
        RecipeError: the run does not exist, is unfinished, is a study, or its report is damaged.
    """
    run = name.removeprefix(RUNS).partition("/")[0]
    report = newest_report(workspace) if run == LATEST else read_report(workspace, run)
    if report is None:
        raise RecipeError(f"the workspace {workspace} has no finished run", "List its runs with: dpo runs")
    return report


def _of_run(name: str, workspace: Path) -> TrainedModel:
    _, slash, policy = name.removeprefix(RUNS).partition("/")
    report = report_of(name, workspace)
    run = report.run.name
    policies = report.models
    if slash:
        alike = (name for name in policies if _plain(name) == _plain(policy))
        chosen = policy if policy in policies else next(alike, None)
    else:
        digest = report.model.sha256 if report.model else None
        chosen = next((name for name, row in policies.items() if row.sha256 == digest), None)
    if chosen is None:
        problem = (
            f"the run {run} has no policy {policy or '(empty)'}"
            if slash
            else f"the run {run} registered no model"
        )
        raise RecipeError(problem, f"Its policies: {', '.join(policies)}")
    row = policies[chosen]
    if row.kind not in (None, "model") or row.sha256 is None:
        problem = f"{chosen} of the run {run} is not a language model"
        raise RecipeError(problem, f"Its policies: {', '.join(policies)}")
    path = Store(workspace).object("model", row.sha256)
    if not path.is_dir():
        raise RecipeError(
            f"the model {chosen} of the run {run} is missing: {path} does not exist",
            f"Run again: {report.run.command}",
        )
    title = f"{chosen} of the run {run}"
    return TrainedModel(Origin(name=f"{RUNS}{run}/{chosen}", title=title, sha256=row.sha256, run=run), path)


def _plain(policy: str) -> str:
    """A policy's name without case and punctuation, so that `online-dpo` matches `Online DPO`."""
    return re.sub("[^a-z0-9]", "", policy.lower())
