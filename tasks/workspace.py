"""The workspace: the folder that holds a person's runs and artifacts, and what its disk may answer."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dpo_core.errors import RecipeError, StageFailed

_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NOTHING_FREE = 2**20  # bytes


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
        workspace.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workspace) as probe:
            probe.write(b"\0" * 4096)


def is_disk_full(said: object, path: Path) -> bool:
    """Whether an error, or the text of one, means that the disk that holds `path` is full."""
    if isinstance(said, OSError) and said.errno in _FULL:
        return True
    # Libraries in other languages (safetensors, torch, SQLite) say it in words, or not at all.
    text = str(said).lower()
    return "no space left" in text or "disk is full" in text or shutil.disk_usage(path).free < _NOTHING_FREE


def disk_full(path: Path, doing: str) -> StageFailed:
    """The error that says so."""
    return StageFailed(
        f"the disk that holds {path} is full ({doing}); nothing half-written was kept",
        "Free some space there, then resume the run.",
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
        if error.errno in _UNUSABLE:
            raise RecipeError(
                f"no access to {where} ({doing}): {error.strerror}",
                "Make the workspace writable for this user, or choose another workspace.",
            ) from error
        raise StageFailed(
            f"{doing} failed at {where}: {error.strerror or error}", "Resume the run."
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
