"""Workspace paths, atomic writes, and translation of OS errors into messages that say what to do."""

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

# Names in a workspace: of the folders of its caches, and of the stage of converted models in its store.
CACHE_FOLDER = "reference_cache"
SUITE_RESULTS = "evaluations"
REPLIES = "judgements"
CONVERT_MODEL = "convert-model"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NOTHING_FREE = 2**20  # bytes
_WRITABLE = "Mount it writable again, after checking its device for faults."


def path_of(uri: str) -> Path | None:
    """The path of a `file://` URI; None for another URI, and for a file of another machine."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" and not parts.netloc else None


def open_workspace(workspace: str | Path) -> Path:
    """The workspace as an absolute path.

    Raises:
        RecipeError: the workspace is a remote URL or a file.
    """
    text = os.fspath(workspace)
    text = str(path_of(text) or text)
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise RecipeError(
            f"workspace {text} is a remote URL, but a workspace must be a mounted folder",
            "Give a local path, or mount the bucket and give the mount point.",
        )
    path = Path(text).expanduser().absolute()
    with disk_errors(path, "looking for the workspace"):
        if path.exists() and not path.is_dir():
            raise RecipeError(f"workspace {path} is a file", "Give a folder.")
    return path


def run_folder(workspace: str | Path, run_id: str) -> Path:
    """The folder of a run's page, report and log; created if it does not exist.

    Raises:
        RecipeError: the name is a path.
    """
    folder = Path(workspace) / "runs" / plain_name(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def plain_name(run_id: str) -> str:
    """Check that a run's name is a plain folder name, and return it.

    Raises:
        RecipeError: it is not, for example because it is a path.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}", run_id):
        raise RecipeError(f"{run_id!r} is not the name of a run", "List them with: dpo runs")
    return run_id


def require_writable(workspace: Path) -> None:
    """Create the workspace and test a write, before a run spends time on results that it could not store.

    Raises:
        RecipeError: the workspace cannot be created or written.
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
            # The remedy must not mention a resume: nothing has run yet.
            raise RecipeError(disk_read_only(workspace, "making the workspace").problem, _WRITABLE) from error


def disk_fault(error: object, path: Path, doing: str) -> StageFailed | None:
    """A disk-full or read-only error if that caused the failure, else None.

    Args:
        error: the error, or its text.
    """
    # Libraries in other languages (safetensors, torch, SQLite) report it only as text, or not at all.
    if says_disk_full(error) or shutil.disk_usage(path).free < _NOTHING_FREE:
        return disk_full(path, doing)
    if says_read_only(error) or _is_read_only(path):
        return disk_read_only(path, doing)
    return None


def _is_read_only(path: Path) -> bool:
    """Whether a test write fails: after a device fault, ext4's mount flags still say writable."""
    path = next(place for place in (path, *path.parents) if place.is_dir())
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def says_disk_full(error: object) -> bool:
    """Whether an error, or its text, reports a full disk."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error).lower()
    return "no space left" in text or "disk is full" in text


def says_read_only(error: object) -> bool:
    """Whether an error, or its text, reports a read-only disk."""
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return True
    text = str(error).lower()
    return "read-only file system" in text or "readonly database" in text


def disk_full(path: Path, doing: str) -> StageFailed:
    """The error for a full disk."""
    return StageFailed(
        f"the disk that holds {path} is full ({doing}); no partial result was stored",
        "Free some space there, then resume the run.",
    )


def disk_read_only(path: Path, doing: str) -> StageFailed:
    """The error for a read-only disk. The kernel makes a disk read-only when its device has a fault."""
    return StageFailed(
        f"the disk that holds {path} is read-only ({doing}: Read-only file system); "
        "no partial result was stored",
        f"{_WRITABLE} Then resume the run.",
    )


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into a RecipeError or StageFailed with the path and the remedy."""
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
    """Size in bytes of a file, or of all files below a folder."""
    total = path.stat().st_size if path.is_file() else 0
    for where, _, files in os.walk(path):
        for file in files:
            with suppress(FileNotFoundError):  # a run at work renames its temporary files
                total += os.lstat(os.path.join(where, file)).st_size
    return total
