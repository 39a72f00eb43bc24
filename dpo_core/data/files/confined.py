"""Data sets that strangers name: none of their files may be read through a link that leads elsewhere.

The name is looked at when it is given. What lies in a folder can be another file when it is opened, so each
opened file is asked where it really lies.
"""

import os
from pathlib import Path
from typing import BinaryIO

from dpo_core.errors import DataError

_allowed: dict[Path, Path] = {}
"""By the place that was named: the folder, links followed, that its files must lie in."""


def confine(source: str, folder: Path) -> None:
    """From now on this process reads no file of the source that lies outside of the folder."""
    _allowed[Path(source).expanduser().absolute()] = folder.expanduser().resolve()


def open_file(path: Path) -> BinaryIO:
    """Open a file to read; of a confined source only where it lies in its folder.

    Raises:
        DataError: it does not.
        OSError: it cannot be opened.
    """
    file = path.open("rb", buffering=2**20)
    place = path.absolute()
    for source, folder in _allowed.items():
        if place.is_relative_to(source) and not _lies_in(file, folder):
            file.close()
            raise DataError(
                f"{path} is a link out of {folder}, and this worker reads no other data (DPO_DATA)",
                "Put the file itself there",
            )
    return file


def again(file: BinaryIO, path: Path) -> str:
    """A path that opens the very file once more while it is open; without a /proc its own path."""
    opened = f"/proc/self/fd/{file.fileno()}"
    return opened if os.path.exists(opened) else str(path)


def _lies_in(file: BinaryIO, folder: Path) -> bool:
    return Path(os.path.realpath(f"/proc/self/fd/{file.fileno()}")).is_relative_to(folder)
