"""The champion: the registered version with the alias `champion`, which new models are compared with."""

import logging
from typing import NamedTuple

from tasks.promotion.ledger import champion_of
from tasks.promotion.model_source import model_of_version, require_intact, version_title, weights_of
from tasks.store.manifest import Manifest
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")

NAME = "Champion"
"""The champion's name as a policy in tables."""


class Champion(NamedTuple):
    """A registered version whose files are on this machine."""

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
