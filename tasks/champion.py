"""The model that a new one is held against: the version of the registry with the alias `champion`."""

import logging
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dpo_core.models import weights_digest
from tasks.manifest import Manifest
from tasks.tracking import Tracker

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
    version = tracker.version_of(registered, ALIAS)
    if version is None:
        return None
    title = f"{registered} version {version.version}"
    parts = urlsplit(version.tags.get("dpo.weights_uri", ""))
    folder = Path(unquote(parts.path))
    artifact = version.tags.get("dpo.artifact_sha256")
    if parts.scheme != "file" or not (folder / "config.json").is_file() or not artifact:
        log.warning("the champion %s has no files at %s; the run is held against its reference",
                    title, parts.geturl() or "any address")  # fmt: skip
        return None
    manifest = Manifest(
        kind="model",
        uri=folder.as_uri(),
        sha256=artifact,
        schema_version=1,
        stage="champion",
        stage_version=1,
        config_digest=artifact,
        extra={"weights_sha256": weights_digest(folder)},
    )
    return Champion(title, manifest)
