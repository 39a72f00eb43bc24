"""Manifests: the JSON descriptions of artifacts that stages exchange in place of models, tensors or tables.

A manifest identifies an artifact (a folder of files) by the digest of its content, and records its origin.
"""

import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field, JsonValue

from dpo_core.config import Config
from dpo_core.errors import DpoError, StageFailed
from dpo_core.system import digest_file, digest_json
from tasks.store.files import path_of

# The digest in a plan of an artifact that does not exist yet.
PLANNED = "0" * 64

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

# hashlib releases the GIL, and SHA-256 in hardware is faster than most disks: more threads gain nothing.
HASH_THREADS = 2

# A file written this recently may change again within the resolution of its time stamp: hash it again.
_SETTLED_SECONDS = 2.0


class FileEntry(Config):
    """One file of an artifact."""

    sha256: Sha256
    """Digest of the file's content."""
    bytes: int = Field(ge=0)
    """Size of the file."""


class Manifest(Config):
    """The kind, location, digest and origin of an artifact; immutable."""

    kind: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Kind of content: dataset, model, reference, report, ..."""
    uri: str
    """Absolute `file://` URI of the artifact's folder."""
    sha256: Sha256
    """Digest of the folder: see `digest_entries`."""
    schema_version: int = Field(ge=1)
    """Version of the file layout."""
    rows: int | None = Field(default=None, ge=0)
    """Number of rows, for data."""
    parameters: int | None = Field(default=None, ge=0)
    """Number of parameters, for models."""
    parents: tuple[Sha256, ...] = ()
    """Digests of the artifacts that this one was made from."""
    stage: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The stage that made it."""
    stage_version: int = Field(ge=0)
    """Version of that stage's code. Raising it makes the stage run again."""
    config_digest: Sha256
    """Digest of the part of the recipe that the stage read."""
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """Time of the commit (UTC)."""
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """Small facts: metrics, counts. Not part of the digest."""
    files: dict[str, FileEntry] = Field(default_factory=dict)
    """Size and digest of each file, by its path inside the folder (with `/`)."""

    @property
    def planned(self) -> bool:
        """Whether the artifact is only planned and has no files."""
        return self.sha256 == PLANNED

    @property
    def path(self) -> Path:
        """The artifact's folder on this machine.

        Raises:
            StageFailed: the URI is not a local one.
        """
        path = path_of(self.uri)
        if path is None:
            raise StageFailed(
                f"the {self.kind} at {self.uri} is not a folder on this machine",
                "Start the run in a workspace on this machine",
            )
        return path


def list_files(folder: Path | str) -> dict[str, Path]:
    """Every file below a folder, by its relative path with `/`, sorted. Empty folders are ignored.

    Raises:
        StageFailed: the folder contains a symbolic link, socket or device.
        OSError: the folder cannot be read.
    """
    files: dict[str, Path] = {}
    pending = [Path(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif entry.is_file(follow_symlinks=False):
                    files[path.relative_to(folder).as_posix()] = path
                else:
                    raise StageFailed(
                        f"{path} is a symbolic link or a special file, which an artifact cannot contain",
                        "Write a copy of the file instead.",
                    )
    return dict(sorted(files.items()))


def digest_files(files: Mapping[str, Path]) -> dict[str, FileEntry]:
    """Size and digest of each file, two files at a time."""

    def entry(path: Path) -> FileEntry:
        return FileEntry(sha256=digest_file(path), bytes=path.stat().st_size)

    if len(files) < 2:
        return {name: entry(path) for name, path in files.items()}
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(files, pool.map(entry, files.values()), strict=True))


def digest_entries(files: Mapping[str, FileEntry]) -> str:
    """Digest of an artifact: SHA-256 over the sorted pairs (relative path, SHA-256 of the file)."""
    return digest_json([[name, files[name].sha256] for name in sorted(files)])


def digest_folder(folder: Path | str) -> str:
    """Digest of a folder as an artifact. Depends only on relative paths and contents."""
    return digest_entries(digest_files(list_files(folder)))


class Digests:
    """A cache of file digests; a file that changed is hashed again."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}
        """By path, size, time stamp in nanoseconds and inode."""

    def of(self, path: Path) -> str:
        """SHA-256 of the file's content."""
        stat = path.stat()
        mark = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if mark in self._known:
            return self._known[mark]
        digest = digest_file(path)
        if time.time() - stat.st_mtime > _SETTLED_SECONDS:
            self._known[mark] = digest
        return digest


def find_damage(folder: Path, files: Mapping[str, FileEntry], digests: Digests) -> str | None:
    """The first difference between a folder and the files that its manifest lists, in words; None if equal.

    Args:
        digests: a cache of file digests.

    Raises:
        PermissionError: a file is not readable, which is not damage.
    """
    try:
        present = list_files(folder)
        sizes = {name: path.stat().st_size for name, path in present.items()}
        for name in sorted(files.keys() | sizes.keys()):
            fault = _fault(sizes.get(name), files.get(name))
            if fault:
                return f"file {name}: {fault}"
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            contents = pool.map(digests.of, present.values())
            for name, digest in zip(present, contents, strict=True):
                if digest != files[name].sha256:
                    return f"file {name}: content {digest[:12]} instead of {files[name].sha256[:12]}"
    except PermissionError:
        raise
    except FileNotFoundError as error:
        fault = f"file {error.filename}: missing"
    except (OSError, DpoError) as error:
        fault = f"unreadable: {error}"
    else:
        fault = None
    return fault


def _fault(size: int | None, entry: FileEntry | None) -> str | None:
    """The fault of a file that shows without reading its content: missing, unexpected or of another size."""
    if size is None:
        return "missing"
    if entry is None:
        return "not part of the artifact"
    return None if size == entry.bytes else f"{size} bytes instead of {entry.bytes}"


def stage_key(
    stage: str, stage_version: int, config_digest: str, inputs: Mapping[str, str] | Iterable[str]
) -> str:
    """The key under which a stage's result is stored and looked up.

    Args:
        inputs: digests of all artifacts that the stage reads. The order of a list does not matter; give a
            mapping from role to digest if roles matter (policy and reference).
    """
    digests = dict(inputs) if isinstance(inputs, Mapping) else sorted(inputs)
    return digest_json([stage, stage_version, config_digest, digests])
