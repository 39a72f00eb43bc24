"""The workspace: the folder that holds a person's runs and artifacts, and what its disk may answer."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dpo_core.errors import RecipeError, StageFailed

CACHE_FOLDER = "reference_cache"
"""Folder of a workspace that holds the caches of reference log-probs."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NOTHING_FREE = 2**20  # bytes
_WRITABLE = "Mount it writable again, after a check where its device has a fault."


def open_workspace(workspace: str | Path) -> Path:
    """The workspace as an absolute path.

    Raises:
        RecipeError: it is a remote URL, or a file stands there.
    """
    text = os.fspath(workspace)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise RecipeError(
            f"workspace {text} is a remote URL, and the store works on mounted folders only so far",
            "Give a local path, or mount the bucket and give the mount point.",
        )
    path = Path(text).expanduser().absolute()
    with disk_errors(path, "looking for the workspace"):
        if path.exists() and not path.is_dir():
            raise RecipeError(f"workspace {path} is a file", "Give a folder.")
    return path


def run_folder(workspace: str | Path, run_id: str) -> Path:
    """Where a run's page, report and log lie.

    Raises:
        RecipeError: the name leads out of the folder of all runs.
    """
    folder = Path(workspace) / "runs" / plain_name(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def plain_name(run_id: str) -> str:
    """The name of a run, which is a folder's beside those of other runs.

    Raises:
        RecipeError: it is a path.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}", run_id):
        raise RecipeError(f"{run_id!r} is not the name of a run", "List them with: dpo runs")
    return run_id


def require_writable(workspace: Path) -> None:
    """Make the workspace and try to write there, before anything is spent on a run that could keep nothing.

    Raises:
        RecipeError: it cannot be made or written.
        StageFailed: its disk is full.
    """
    with disk_errors(workspace, "making the workspace"):
        try:
            workspace.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=workspace) as probe:
                probe.write(b"\0" * 4096)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            # Nothing ran yet that could be resumed.
            raise RecipeError(disk_read_only(workspace, "making the workspace").problem, _WRITABLE) from error


def disk_fault(said: object, path: Path, doing: str) -> StageFailed | None:
    """The error that says what the disk that holds `path` has to do with a failure; None where nothing.

    Args:
        said: the failure, or the text of one.
    """
    # Libraries in other languages (safetensors, torch, SQLite) say it in words, or not at all.
    if says_disk_full(said) or shutil.disk_usage(path).free < _NOTHING_FREE:
        return disk_full(path, doing)
    if says_read_only(said) or _is_read_only(path):
        return disk_read_only(path, doing)
    return None


def _is_read_only(path: Path) -> bool:
    """Asked by a write: ext4 does not show in its mount flags that it stopped after a fault."""
    path = next(place for place in (path, *path.parents) if place.is_dir())
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def says_disk_full(said: object) -> bool:
    """Whether an error, or the text of one, names a full disk."""
    if isinstance(said, OSError) and said.errno in _FULL:
        return True
    text = str(said).lower()
    return "no space left" in text or "disk is full" in text


def says_read_only(said: object) -> bool:
    """Whether an error, or the text of one, names a disk that can only be read."""
    if isinstance(said, OSError) and said.errno == errno.EROFS:
        return True
    text = str(said).lower()
    return "read-only file system" in text or "readonly database" in text


def disk_full(path: Path, doing: str) -> StageFailed:
    """The error that says so."""
    return StageFailed(
        f"the disk that holds {path} is full ({doing}); nothing half-written was kept",
        "Free some space there, then resume the run.",
    )


def disk_read_only(path: Path, doing: str) -> StageFailed:
    """The error that says so. A kernel makes a disk read-only when it meets a fault of the device."""
    return StageFailed(
        f"the disk that holds {path} can only be read ({doing}: Read-only file system); "
        "nothing half-written was kept",
        f"{_WRITABLE} Then resume the run.",
    )


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Turns an OSError into a sentence with the path and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in _FULL:
            raise disk_full(path, doing) from error
        if error.errno == errno.EROFS or (error.errno == errno.EIO and _is_read_only(path)):
            raise disk_read_only(path, doing) from error
        if error.errno in _UNUSABLE:
            raise RecipeError(
                f"no access to {where} ({doing}): {error.strerror}",
                "Make the workspace writable for this user, or choose another workspace.",
            ) from error
        raise StageFailed(
            f"{doing} failed at {where}: {error.strerror or error}", "Resume the run."
        ) from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files below a folder."""
    total = path.stat().st_size if path.is_file() else 0
    for where, _, files in os.walk(path):
        for file in files:
            with suppress(FileNotFoundError):  # a run at work renames its temporary files
                total += os.lstat(os.path.join(where, file)).st_size
    return total
