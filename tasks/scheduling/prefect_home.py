"""Checks that Prefect's home folder (database, profiles, locks) is writable."""

import tempfile
from pathlib import Path

from prefect.settings import get_current_settings

REMEDY = "Set PREFECT_HOME (or HOME) to a writable folder"


def unwritable_home() -> tuple[Path, str] | None:
    """The folder and the reason why it is not writable; None if it is. Creates the folder."""
    home = get_current_settings().home
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        return home, error.strerror or str(error)
    return None
