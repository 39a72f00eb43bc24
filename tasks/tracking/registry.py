"""MLflow's model registry: register weights by reference, and find versions by alias, number or digest."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from tasks.tracking.mlflow_calls import all_pages, create_if_missing
from tasks.tracking.mlflow_run import TAG_CHARS, cut
from tasks.tracking.tracker import Tracker


def register_model(
    tracker: Tracker,
    name: str,
    folder: str,
    parent_run: str | None = None,
    alias: str = "challenger",
    tags: Mapping[str, str] | None = None,
) -> str:
    """Register weights by reference, without uploading them; returns the version.

    The version's tag `dpo.weights_uri` holds the URI, and so does its source. Servers accept no local paths
    as a source; there the source is the logged model. The same weights of the same run are registered once.

    Args:
        folder: path or URI of the weights.
        parent_run: id of the MLflow run that trained them; default: the tracker's own run.

    Raises:
        StageFailed: MLflow does not answer.
        RecipeError: MLflow rejects the request.
    """
    run_id = parent_run or tracker.run_id
    uri = folder if "://" in folder else Path(folder).absolute().as_uri()
    all_tags = {key: cut(value, TAG_CHARS) for key, value in (tags or {}).items()} | {"dpo.weights_uri": uri}

    def register(client: Any) -> str:
        create_if_missing(lambda: client.create_registered_model(name))
        # Search this run's versions only: the model of a nightly recipe has one for every night.
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        same = [entry.version for entry in known if entry.tags.get("dpo.weights_uri") == uri]
        if same:
            version = str(same[0])
        else:
            model_id = _logged_model(client, tracker.uri, name, uri, run_id, all_tags)
            version = _new_version(client, name, uri, run_id, all_tags, model_id)
        client.set_registered_model_alias(name, alias, version)
        return version

    return tracker.ask(f"model {name}", register)


def version_with(tracker: Tracker, name: str, sha256: str) -> Any | None:
    """The newest registered version whose weights have this digest and still exist; None if there is none.

    Args:
        sha256: the artifact's digest, as in the tag `dpo.artifact_sha256`.

    Raises:
        StageFailed: MLflow does not answer.
    """

    def find(client: Any) -> Any | None:
        versions = all_pages(partial(client.search_model_versions, f"name = '{name}'"))
        same = [v for v in versions if v.tags.get("dpo.artifact_sha256") == sha256 and _exists(v)]
        return max(same, key=lambda version: int(version.version), default=None)

    return tracker.ask(f"the versions of {name}", find)


def _exists(version: Any) -> bool:
    """Whether a version's files exist; True without a check if its URI is not a local one."""
    parts = urlsplit(version.tags.get("dpo.weights_uri", ""))
    return parts.scheme != "file" or Path(unquote(parts.path)).is_dir()


def _new_version(client: Any, name: str, uri: str, run_id: str, tags: dict[str, str], model_id: str) -> str:
    facts = {"run_id": run_id, "tags": tags, "model_id": model_id}
    try:
        return str(client.create_model_version(name, uri, **facts).version)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        return str(client.create_model_version(name, f"models:/{model_id}", **facts).version)


def _logged_model(
    client: Any, tracking_uri: str, name: str, uri: str, run_id: str, tags: dict[str, str]
) -> str:
    """Id of the run's logged model for these weights. One that a killed process left unready is replaced."""
    experiment = client.get_run(run_id).info.experiment_id
    for logged in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if logged.tags.get("dpo.weights_uri") == uri:
            if logged.status == LoggedModelStatus.READY:
                return str(logged.model_id)
            client.delete_logged_model(logged.model_id)
    mlflow.set_tracking_uri(tracking_uri)  # create_external_model reads only the global address
    model = mlflow.create_external_model(
        name=re.sub(r"[/:.%\"']", "-", name),
        source_run_id=run_id,
        tags=tags,
        model_type="dpo-policy",
        experiment_id=experiment,
    )
    return str(model.model_id)


def version_of(tracker: Tracker, name: str, alias: str) -> Any | None:
    """The registered version with the alias; None if the model or the alias does not exist.

    Raises:
        StageFailed: MLflow does not answer.
        RecipeError: MLflow rejects the request.
    """
    return _if_exists(
        tracker, f"the {alias} of {name}", lambda client: client.get_model_version_by_alias(name, alias)
    )


def numbered(tracker: Tracker, name: str, number: str) -> Any | None:
    """The registered version with this number; None if it does not exist.

    Raises:
        StageFailed: MLflow does not answer.
        RecipeError: MLflow rejects the request.
    """
    return _if_exists(
        tracker, f"version {number} of {name}", lambda client: client.get_model_version(name, number)
    )


def _if_exists(tracker: Tracker, what: str, read: Callable[[Any], Any]) -> Any | None:
    def find(client: Any) -> Any | None:
        try:
            return read(client)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    return tracker.ask(what, find)
