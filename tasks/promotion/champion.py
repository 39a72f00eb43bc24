"""The model that a new one is held against: the version of the registry with the alias `champion`."""

import logging
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.models.load import weights_digest
from tasks.recipe.sections import TrackingConfig
from tasks.store.facts import ModelFacts
from tasks.store.manifest import Manifest, digest_folder
from tasks.tracking.registry import version_of
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")

ALIAS = "champion"
NAME = "Champion"
"""Of the policy in tables."""


class Champion(NamedTuple):
    """A registered version whose files are here."""

    title: str
    """`dpo-demo version 3`."""
    manifest: Manifest


def find_champion(tracker: Tracker, registered: str) -> Champion | None:
    """The champion of a registered model; None where there is none, or its files are not on this machine."""
    version = version_of(tracker, registered, ALIAS)
    if version is None:
        return None
    title = titled(version)
    folder = weights_of(version)
    artifact = version.tags.get("dpo.artifact_sha256")
    if folder is None or not artifact:
        log.warning("the champion %s has no files here; the run is held against its reference", title)
        return None
    require_whole(folder, artifact, f"the champion {title}")
    manifest = Manifest(
        kind="model",
        uri=folder.as_uri(),
        sha256=artifact,
        schema_version=1,
        stage="champion",
        stage_version=1,
        config_digest=artifact,
        extra=ModelFacts(weights_sha256=weights_digest(folder)).as_extra(),
    )
    return Champion(title, manifest)


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


def titled(version: Any) -> str:
    """A registered version as sentences and decisions name it."""
    return f"{version.name} version {version.version}"


def weights_of(version: Any) -> Path | None:
    """The checkpoint folder of a registered version; None where it is not on this machine."""
    parts = urlsplit(version.tags.get("dpo.weights_uri", ""))
    folder = Path(unquote(parts.path))
    return folder if parts.scheme == "file" and (folder / "config.json").is_file() else None


def registered_weights(spec: str, workspace: Path) -> Path:
    """The checkpoint folder of `models:/NAME@ALIAS`.

    Raises:
        RecipeError: there is no such version, or its files are not here.
    """
    name, _, alias = spec.removeprefix("models:/").partition("@")
    version = version_of(Tracker(TrackingConfig(), workspace), name, alias) if name and alias else None
    folder = weights_of(version) if version is not None else None
    if version is None or folder is None:
        raise RecipeError(
            f"the registry knows no {spec} whose files are on this machine",
            "Write models:/NAME@ALIAS, for example models:/dpo-demo@challenger",
        )
    require_whole(folder, version.tags.get("dpo.artifact_sha256"), spec)
    return folder
