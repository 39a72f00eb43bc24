"""Opens data files, plain or compressed; refuses those of a confined path that lie outside of its folder.

A path is checked when it is configured, but a file may be replaced before it is opened. So the real path of
each opened file is checked as well.
"""

import gzip
import io
import os
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

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


def open_plain(path: Path) -> BinaryIO:
    """The decompressed bytes. The file's first bytes decide, because its ending may be wrong."""
    file = open_file(path)
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 2**20)
    # A skippable frame (pzstd writes one in front) counts too: 0x184D2A50 to 0x184D2A5F.
    if magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
        # zstandard's own reader is not used: it reports no error at the end of a truncated file.
        with file:
            return io.BufferedReader(pa.input_stream(reopen_path(file, path), compression="zstd"), 2**20)
    return file


def open_table(path: Path) -> Any:
    """A random-access source: the file itself, or the decompressed bytes in memory."""
    with closing(open_plain(path)) as stream:
        if isinstance(getattr(stream, "raw", None), io.FileIO):
            return pa.memory_map(reopen_path(stream, path))
        return pa.BufferReader(stream.read())
