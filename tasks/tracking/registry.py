"""MLflow's model registry: register weights by reference, and find versions by alias, number or digest."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from tasks.store.files import path_of
from tasks.tracking.connection import all_pages, create_if_missing
from tasks.tracking.mlflow_run import TAG_CHARS, cut
from tasks.tracking.tracker import Tracker


def register_model(
    tracker: Tracker,
    name: str,
    folder: str | Path,
    alias: str = "challenger",
    tags: Mapping[str, str] | None = None,
) -> str:
    """Register weights by reference, without uploading them; returns the version.

    The version's tag `dpo.weights_uri` says where they are. The same weights of the same run are registered
    once.

    Args:
        folder: the weights of the tracker's run.

    Raises:
        StageFailed: MLflow does not answer.
        RecipeError: MLflow rejects the request.
    """
    run_id, uri = tracker.run_id, Path(folder).absolute().as_uri()
    all_tags = {key: cut(value, TAG_CHARS) for key, value in (tags or {}).items()} | {"dpo.weights_uri": uri}

    def register(client: Any) -> str:
        create_if_missing(lambda: client.create_registered_model(name))
        # Search this run's versions only: the model of a nightly recipe has one for every night.
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        same = [entry.version for entry in known if entry.tags.get("dpo.weights_uri") == uri]
        if same:
            version = str(same[0])
        else:
            # Servers accept no local path as a source.
            source = f"runs:/{run_id}/weights"
            version = str(client.create_model_version(name, source, run_id, all_tags).version)
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
    path = path_of(version.tags.get("dpo.weights_uri", ""))
    return path is None or path.is_dir()


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
