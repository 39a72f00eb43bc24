"""MLflow's model registry: models registered by reference, and who holds an alias."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tasks.tracking.mlflow_calls import every, unless_there
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

    The version's tag `dpo.weights_uri` holds the URI. Its source does so too, except on a server, which
    takes no local paths: there the source is the logged model. The same weights of the same run are
    registered once.

    Args:
        folder: where the weights are: a path or a URI.
        parent_run: the alignment that made them; the tracker's own if not given.

    Raises:
        StageFailed: MLflow does not answer.
        RecipeError: it refuses.
    """
    run_id = parent_run or tracker.run_id
    uri = folder if "://" in folder else Path(folder).absolute().as_uri()
    given = {key: cut(value, TAG_CHARS) for key, value in (tags or {}).items()} | {"dpo.weights_uri": uri}

    def register(client: Any) -> str:
        unless_there(lambda: client.create_registered_model(name))
        # Of this run alone: a model of a nightly recipe has a version for every night.
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        same = [found.version for found in known if found.tags.get("dpo.weights_uri") == uri]
        if same:
            version = str(same[0])
        else:
            model_id = _logged_model(client, tracker.uri, name, uri, run_id, given)
            version = _new_version(client, name, uri, run_id, given, model_id)
        client.set_registered_model_alias(name, alias, version)
        return version

    return tracker.ask(f"model {name}", register)


def version_with(tracker: Tracker, name: str, sha256: str) -> Any | None:
    """The newest registered version whose weights have this digest and still are where they were; else None.

    Args:
        sha256: of the artifact, as the tag `dpo.artifact_sha256` holds it.

    Raises:
        StageFailed: MLflow does not answer.
    """

    def find(client: Any) -> Any | None:
        versions = every(partial(client.search_model_versions, f"name = '{name}'"))
        same = [
            found for found in versions if found.tags.get("dpo.artifact_sha256") == sha256 and _there(found)
        ]
        return max(same, key=lambda found: int(found.version), default=None)

    return tracker.ask(f"the versions of {name}", find)


def _there(version: Any) -> bool:
    """Whether its files are here; those of another kind of store are taken to be."""
    parts = urlsplit(version.tags.get("dpo.weights_uri", ""))
    return parts.scheme != "file" or Path(unquote(parts.path)).is_dir()


def _new_version(client: Any, name: str, uri: str, run_id: str, tags: dict[str, str], model_id: str) -> str:
    from mlflow.exceptions import MlflowException

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
    """The logged model of these weights of this run; a killed process may have left it, or half of it."""
    import mlflow
    from mlflow.entities import LoggedModelStatus

    experiment = client.get_run(run_id).info.experiment_id
    for found in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if found.tags.get("dpo.weights_uri") == uri:
            if found.status == LoggedModelStatus.READY:
                return str(found.model_id)
            client.delete_logged_model(found.model_id)
    mlflow.set_tracking_uri(tracking_uri)  # create_external_model knows the global address only
    made = mlflow.create_external_model(
        name=re.sub(r"[/:.%\"']", "-", name),
        source_run_id=run_id,
        tags=tags,
        model_type="dpo-policy",
        experiment_id=experiment,
    )
    return str(made.model_id)


def version_of(tracker: Tracker, name: str, alias: str) -> Any | None:
    """The registered version that the alias points to; None where model or alias is not there.

    Raises:
        StageFailed: MLflow does not answer.
        RecipeError: it refuses.
    """
    return _if_there(
        tracker, f"the {alias} of {name}", lambda client: client.get_model_version_by_alias(name, alias)
    )


def numbered(tracker: Tracker, name: str, number: str) -> Any | None:
    """A registered version by its number; None where there is none.

    Raises:
        StageFailed: MLflow does not answer.
        RecipeError: it refuses.
    """
    return _if_there(
        tracker, f"version {number} of {name}", lambda client: client.get_model_version(name, number)
    )


def _if_there(tracker: Tracker, what: str, read: Callable[[Any], Any]) -> Any | None:
    from mlflow.exceptions import MlflowException

    def find(client: Any) -> Any | None:
        try:
            return read(client)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    return tracker.ask(what, find)
