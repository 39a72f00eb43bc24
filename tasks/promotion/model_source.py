"""Models that were trained here, by name: a version of MLflow's registry, or a policy of a finished run.

    models:/NAME@ALIAS     the registered version that holds the alias
    models:/NAME/VERSION   a registered version
    runs:/RUN              the model that a run of the workspace registered; RUN is a name of `dpo runs`, or
                           `latest`: the newest finished run, of whatever recipe
    runs:/RUN/POLICY       a policy of the run, in capitals or not

Aliases and `latest` move. A run therefore notes at its start which version or policy they name
(`RunRecord.models`), and a resume goes on with that one.
"""

import re
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.models.load import ModelConfig, weights_digest
from dpo_core.redaction import hidden
from tasks.promotion.finished_run import database_gone, newest_report, read_report, registry_of
from tasks.promotion.ledger import ALIAS, SUFFIX, champion_of
from tasks.recipe.policies import elsewhere
from tasks.recipe.sections import TrackingConfig
from tasks.reports.run_report import RunReport
from tasks.store.facts import ModelFacts, Origin
from tasks.store.manifest import Manifest, digest_folder
from tasks.store.store import Store
from tasks.tracking.mlflow_calls import every
from tasks.tracking.registry import numbered, version_of
from tasks.tracking.tracker import Tracker

MODELS, RUNS, LATEST = "models:/", "runs:/", "latest"
FORMS = "Write models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN or runs:/RUN/POLICY"


class TrainedModel(NamedTuple):
    """A model that was trained here and whose files are on this machine."""

    origin: Origin
    path: Path
    """The checkpoint folder."""

    @property
    def manifest(self) -> Manifest:
        """The model as stages hand it on."""
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
    """The model of that name; changes nothing.

    Args:
        name: one of the forms above.
        tracker: whose registry is asked; None: the MLflow that the runs of the workspace wrote to.
        verify: compare the files with their digest, which reads them all.

    Raises:
        RecipeError: no such model, version, alias, run or policy; its files are not here, are damaged, or are
            a reward model's.
        StageFailed: MLflow does not answer.
    """
    if name.startswith(RUNS):
        model = _of_run(name, workspace)
    else:
        model = _registered(name, tracker or _registry(workspace))
    if verify:
        require_whole(model.path, model.origin.sha256, model.origin.title)
    return model


def pinned_name(name: str, workspace: Path, tracker: Tracker) -> str:
    """The name that will always mean the model that `name` means now. Raises as `resolve`."""
    return resolve(name, workspace, tracker, verify=False).origin.name if elsewhere(name) else name


def as_folder(
    config: ModelConfig, workspace: Path, tracker: Tracker | None = None, *, verify: bool = False
) -> tuple[ModelConfig, Origin | None]:
    """The settings with a trained model's checkpoint folder in place of its name, and where that comes from;
    of other models the settings as they are, and None. Raises as `resolve`."""
    if not elsewhere(config.name):
        return config, None
    if config.revision is not None:
        raise RecipeError(
            f"model.revision would not be read: {config.name} is no model of the hub",
            "Leave it out; models:/NAME/VERSION names a version",
        )
    model = resolve(config.name, workspace, tracker, verify=verify)
    return config.model_copy(update={"name": str(model.path)}), model.origin


# The registry -----------------------------------------------------------------------------------------------


def _registered(name: str, tracker: Tracker) -> TrainedModel:
    model, mark, chosen = re.fullmatch(r"models:/([^/@]*)([/@]?)(.*)", name).groups()  # type: ignore[union-attr]
    if not model or not chosen or "/" in chosen:
        raise RecipeError(f"{name} names no registered version", FORMS)
    version = None
    if database_gone(tracker.uri):  # MLflow would make it
        pass
    elif mark == "@" and chosen == ALIAS:
        version = champion_of(tracker, model)
    elif mark == "@":
        version = version_of(tracker, model, chosen)
    else:
        version = numbered(tracker, model, chosen)
    if version is None:
        raise _unknown(tracker, model, mark, chosen)
    return of_version(tracker, version, chosen if mark == "@" else None)


def _registry(workspace: Path) -> Tracker:
    with suppress(RecipeError):  # no run has finished there
        return registry_of(workspace)
    return Tracker(TrackingConfig(), workspace)


def of_version(tracker: Tracker, version: Any, alias: str | None = None) -> TrainedModel:
    """A registered version as a model.

    Args:
        alias: the one that named it.

    Raises:
        RecipeError: its files are not on this machine, or they are no policy's.
    """
    title = titled(version)
    run = _trained_by(tracker, version.run_id) if version.run_id else None
    folder, sha256 = weights_of(version), version.tags.get("dpo.artifact_sha256")
    place = version.tags.get("dpo.weights_uri", "")
    if "/objects/reward-model/" in place:
        raise RecipeError(f"{title} is a reward model", "Name a language model")
    if not place or not sha256:
        raise RecipeError(
            f"{title} was not registered by a run: it lacks the tags dpo.weights_uri and dpo.artifact_sha256",
            "Download it, and name its folder",
        )
    if folder is None:
        again = f"run again what trained it, the run {run}" if run else "run again what trained it"
        raise RecipeError(
            f"the files of {title} are not on this machine: {place}", f"Go on where they are, or {again}"
        )
    origin = Origin(
        name=f"{MODELS}{version.name}/{version.version}",
        title=f"{title} ({alias})" if alias else title,
        sha256=sha256,
        run=run,
    )
    return TrainedModel(origin, folder)


def titled(version: Any) -> str:
    """A registered version as sentences and decisions name it."""
    return f"{version.name} version {version.version}"


def weights_of(version: Any) -> Path | None:
    """The checkpoint folder of a registered version; None where it is not on this machine."""
    parts = urlsplit(version.tags.get("dpo.weights_uri", ""))
    folder = Path(unquote(parts.path))
    return folder if parts.scheme == "file" and (folder / "config.json").is_file() else None


def require_whole(folder: Path, sha256: str | None, what: str) -> None:
    """Refuse files that are not those of the artifact with this digest.

    Raises:
        RecipeError: they are damaged.
    """
    try:
        whole = sha256 is None or digest_folder(folder) == sha256
    except (OSError, StageFailed):
        whole = False
    if not whole:
        raise RecipeError(
            f"{what} is damaged: the files in {folder} are not those that were stored",
            "Run the recipe that made it again, which rebuilds them",
        )


def _trained_by(tracker: Tracker, run_id: str) -> str | None:
    """The name of a run in MLflow; None where it was deleted."""
    from mlflow.exceptions import MlflowException

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
    """What is not there, and what is."""
    first = (
        "Start the first run from a base model (--set model.name=…) and promote what it registers: "
        "dpo promote RUN"
    )
    models = {}
    if not database_gone(tracker.uri):
        search = tracker.ask("the registered models", lambda client: every(client.search_registered_models))
        models = {known.name: known for known in search if not known.name.endswith(SUFFIX)}
    if model not in models:
        problem = f"the registry at {hidden(tracker.uri)} has no model {model}"
        remedy = _choices(model, list(models), "Registered models")
        if (mark, chosen) == ("@", ALIAS):
            return RecipeError(f"{problem}, so it has no champion yet", f"{first}. {remedy}")
        return RecipeError(problem, remedy)
    if (mark, chosen) == ("@", ALIAS):
        return RecipeError(f"{model} has no champion yet", first)
    if mark == "@":
        aliases = [str(alias) for alias in models[model].aliases]
        return RecipeError(f"{model} has no alias {chosen}", _choices(chosen, aliases, "Its aliases"))
    found = tracker.ask(
        f"the versions of {model}",
        lambda client: every(partial(client.search_model_versions, f"name = '{model}'")),
    )
    versions = sorted((str(version.version) for version in found), key=int)
    return RecipeError(f"{model} has no version {chosen}", _choices(chosen, versions, "Its versions"))


def _choices(word: str, known: list[str], what: str) -> str:
    """`Did you mean dpo-demo? Registered models: dpo-demo, dpo-kto`."""
    near = get_close_matches(word, known, n=1)
    return f"{f'Did you mean {near[0]}? ' if near else ''}{what}: {', '.join(known) or 'none'}"


# Runs -------------------------------------------------------------------------------------------------------


def report_of(name: str, workspace: Path) -> RunReport:
    """The report of the run that `runs:/RUN` or `runs:/RUN/POLICY` names.

    Raises:
        RecipeError: there is no such run, or it is not finished, damaged, or a study.
    """
    run = name.removeprefix(RUNS).partition("/")[0]
    report = newest_report(workspace) if run == LATEST else read_report(workspace, run)
    if report is None:
        raise RecipeError(f"the workspace {workspace} holds no finished run", "List its runs with: dpo runs")
    return report


def _of_run(name: str, workspace: Path) -> TrainedModel:
    _, slash, policy = name.removeprefix(RUNS).partition("/")
    report = report_of(name, workspace)
    run = report.run.name
    policies = report.models
    if slash:
        alike = (known for known in policies if _plain(known) == _plain(policy))
        chosen = policy if policy in policies else next(alike, None)
    else:
        digest = report.model.sha256 if report.model else None
        chosen = next((known for known, row in policies.items() if row.sha256 == digest), None)
    if chosen is None:
        problem = (
            f"the run {run} has no policy {policy or '(empty)'}"
            if slash
            else f"the run {run} registered no model"
        )
        raise RecipeError(problem, f"It has: {', '.join(policies)}")
    row = policies[chosen]
    if row.kind not in (None, "model") or row.sha256 is None:
        raise RecipeError(f"{chosen} of the run {run} is no language model", f"It has: {', '.join(policies)}")
    path = Store(workspace).object("model", row.sha256)
    if not path.is_dir():
        raise RecipeError(
            f"the model {chosen} of the run {run} is gone from {path}", f"Run again: {report.run.command}"
        )
    title = f"{chosen} of the run {run}"
    return TrainedModel(Origin(name=f"{RUNS}{run}/{chosen}", title=title, sha256=row.sha256, run=run), path)


def _plain(policy: str) -> str:
    """A policy's name as people type it: online-dpo, dr_grpo."""
    return re.sub("[^a-z0-9]", "", policy.lower())
