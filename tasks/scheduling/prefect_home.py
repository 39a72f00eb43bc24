"""Prefect's own folder, where it keeps its database, profiles and locks."""

import tempfile
from pathlib import Path

REMEDY = "Set PREFECT_HOME (or HOME) to a folder that can be written"


def unwritable_home() -> tuple[Path, str] | None:
    """The folder, and why nothing can be written there; None where it can. The folder is made."""
    from prefect.settings import get_current_settings

    home = get_current_settings().home
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        return home, error.strerror or str(error)
    return None
