"""Confines untrusted data paths to a folder: refuses files that are links to places outside of it.

A path is checked when it is configured, but a file may be replaced before it is opened. So the real path of
each opened file is checked as well.
"""

import os
from pathlib import Path
from typing import BinaryIO

from dpo_core.errors import DataError

_allowed: dict[Path, Path] = {}
"""The resolved folder that files must be in, by the configured path."""


def confine(source: str, folder: Path) -> None:
    """From now on, refuse in this process to open files of the source outside of the folder."""
    _allowed[Path(source).expanduser().absolute()] = folder.expanduser().resolve()


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; a file of a confined source must be in its folder.

    Raises:
        DataError: the file is outside of the folder.
        OSError: it cannot be opened.
    """
    file = path.open("rb", buffering=2**20)
    place = path.absolute()
    for source, folder in _allowed.items():
        if place.is_relative_to(source) and not _lies_in(file, folder):
            file.close()
            raise DataError(
                f"{path} is a link to a place outside of {folder}, the only data folder allowed (DPO_DATA)",
                "Put the file itself into the folder",
            )
    return file


def reopen_path(file: BinaryIO, path: Path) -> str:
    """A path that opens the same open file again; without /proc, the file's own path."""
    opened = f"/proc/self/fd/{file.fileno()}"
    return opened if os.path.exists(opened) else str(path)


def _lies_in(file: BinaryIO, folder: Path) -> bool:
    return Path(os.path.realpath(f"/proc/self/fd/{file.fileno()}")).is_relative_to(folder)
