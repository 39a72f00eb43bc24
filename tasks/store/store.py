"""The content-addressed store of artifacts that makes a stage run once.

    store/objects/<kind>/<sha256[:2]>/<sha256>/   the artifact's files, never changed in place
    store/index/<stage>/<key>.json                the manifest of a stage's result
    store/locks/                                  one lock per key, so that two runs share the work
    store/tmp/                                    unfinished files; see `Store.sweep`
    work/<stage>/<key[:16]>/                      a stage's working folder; survives a kill; `dpo gc` removes
                                                  that of a stage killed just after it was finished

All paths are in the workspace. Files and folders are completed under a temporary name and renamed, the index
entry last. A kill therefore leaves a complete artifact or none.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from pydantic import JsonValue, ValidationError

from dpo_core.errors import StageFailed
from dpo_core.system import digest_json, remove, sync
from dpo_core.temporary import leftovers, temporary_in
from tasks.store.files import disk_errors, open_workspace
from tasks.store.locks import locked
from tasks.store.manifest import (
    Digests,
    FileEntry,
    Manifest,
    digest_entries,
    digest_files,
    find_damage,
    list_files,
)

log = logging.getLogger(__name__)

_WAIT_LINE_SECONDS = 60.0


@dataclass(frozen=True)
class ArtifactInfo:
    """The fields of an artifact's `Manifest` that the stage decides."""

    kind: str
    stage_version: int
    config_digest: str
    parents: Sequence[str] = ()
    rows: int | None = None
    parameters: int | None = None
    extra: Mapping[str, JsonValue] = field(default_factory=dict)


class Store:
    """The artifacts of one workspace. Creating the object changes nothing on disk.

    Args:
        workspace: folder that contains `store/` and `work/`; a path or a `file://` URI.

    Raises:
        RecipeError: the workspace is a remote URL or not a folder.
    """

    def __init__(self, workspace: str | Path) -> None:
        self.workspace = open_workspace(workspace)
        self.root = self.workspace / "store"
        self._digests = Digests()

    def lookup(self, stage: str, key: str) -> Manifest | None:
        """The stage's result for this key, or None if the stage has to run.

        The artifact's file names, sizes and digests are compared with its manifest first. A damaged or
        missing artifact is logged, removed and reported as None.

        Raises:
            RecipeError: the store is not readable.
        """
        index = self._index(stage, key)
        with disk_errors(index, "reading the store"):
            manifest = self.read_entry(index, forget=True)
            if manifest is None:
                return None
            damage = self._damage(manifest)
            if damage is None:
                with suppress(OSError):
                    os.utime(index)  # the time of the last use
                return manifest
            log.warning(
                "artifact %s of stage %s is damaged (%s); it will be rebuilt", manifest.sha256, stage, damage
            )
            # In a read-only workspace look-ups still work; the commit will report the problem.
            with suppress(OSError), self._object_lock(manifest.sha256):
                if self._damage(manifest) is not None:  # no other process rebuilt it meanwhile
                    index.unlink(missing_ok=True)
                    self._discard(manifest.path)
        return None

    def peek(self, stage: str, key: str) -> Manifest | None:
        """`lookup` without side effects: a damaged artifact is reported as None and not removed."""
        index = self._index(stage, key)
        with disk_errors(index, "reading the store"):
            manifest = self.read_entry(index)
            return manifest if manifest is not None and self._damage(manifest) is None else None

    def history(self, stage: str) -> list[Manifest]:
        """The stage's results for all keys; changes nothing."""
        paths = self._children(self.root / "index" / stage)
        entries = [self.read_entry(path) for path in paths]
        return [manifest for manifest in entries if manifest is not None]

    def begin(self, stage: str, key: str) -> Path:
        """The working folder of a stage and key, created if needed; a killed stage finds its checkpoints."""
        self._index(stage, key)
        scratch = self._scratch(stage, key)
        with disk_errors(scratch, f"making the working folder of stage {stage}"):
            scratch.mkdir(parents=True, exist_ok=True)
        return scratch

    def commit(
        self,
        stage: str,
        key: str,
        source: Path | str | Mapping[str, Path | str],
        about: ArtifactInfo,
    ) -> Manifest:
        """Store a stage's result under its key, then remove the stage's working folder.

        Args:
            source: the folder to store, or the files to store by their name inside the artifact. Files in the
                stage's working folder are linked, others copied.
        Returns:
            The manifest. The same content committed again gives the same artifact.

        Raises:
            StageFailed: the result has no files, or the disk is full or broken.
            RecipeError: the workspace is not writable.
        """
        index, scratch = self._index(stage, key), self._scratch(stage, key)
        doing = f"storing the result of stage {stage}"
        with disk_errors(self.root, doing):
            folder = None if isinstance(source, Mapping) else Path(source).absolute()
            files = list_files(folder) if folder else _named_files(source)  # type: ignore[arg-type]
            if not files:
                raise StageFailed(
                    f"stage {stage} produced no files in {folder or scratch}",
                    "Resume the run; if it happens again, report it as a bug",
                )
            manifest = self._manifest(stage, about, digest_files(files))
            target = self.object(about.kind, manifest.sha256)
            target.parent.mkdir(parents=True, exist_ok=True)
            index.parent.mkdir(parents=True, exist_ok=True)
            # Lock both object and index, so that no check of the same content removes the object in between.
            with self._object_lock(manifest.sha256), self.temporary() as temporary:
                # Everything that needs disk space comes first; only renames follow.
                entry = self._write_entry(temporary / index.name, manifest)
                if os.path.lexists(target) and find_damage(target, manifest.files, self._digests) is not None:
                    self._discard(target)
                staged = temporary / "artifact"
                if not os.path.lexists(target):
                    _stage_files(files, scratch, staged)
                with self.guard():  # keeps `dpo gc` from removing the object before its entry exists
                    if not os.path.lexists(target):
                        if not staged.exists():  # `dpo gc` has removed the object meanwhile
                            _stage_files(files, scratch, staged)
                        os.rename(staged, target)
                        sync(target.parent)
                    os.replace(entry, index)
                sync(index.parent)
        shutil.rmtree(scratch, ignore_errors=True)
        return manifest

    def _manifest(self, stage: str, about: ArtifactInfo, files: dict[str, FileEntry]) -> Manifest:
        sha256 = digest_entries(files)
        return Manifest(
            kind=about.kind,
            uri=self.object(about.kind, sha256).as_uri(),
            sha256=sha256,
            schema_version=1,
            rows=about.rows,
            parameters=about.parameters,
            parents=tuple(about.parents),
            stage=stage,
            stage_version=about.stage_version,
            config_digest=about.config_digest,
            extra=_finite(dict(about.extra)),
            files=files,
        )

    @contextmanager
    def lock(self, stage: str, key: str) -> Iterator[None]:
        """Lock a stage and key: of two concurrent runs one does the work and the other uses its result.

        A process that waits logs the holder. The lock is released if the process dies. A thread must not take
        the same lock twice.
        """
        self._index(stage, key)

        def wait(who: str) -> float:
            terminal = logging.getLogger("dpo")
            terminal.info("waiting for stage %s (key %s), which is in progress: %s", stage, key[:16], who)
            return _WAIT_LINE_SECONDS

        with locked(self._lock(stage, key), "locking the store", wait, poll=0.2):
            yield

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Lock the store against `dpo gc` for a short time; see `tasks.runs.references`."""
        path = self.root / "locks" / "gc.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, poll_interval=0.05):
            yield

    def sweep(self) -> None:
        """Remove the unfinished folders of killed processes."""
        for folder in self.leftovers():
            shutil.rmtree(folder, ignore_errors=True)

    def leftovers(self) -> list[Path]:
        """The unfinished folders of killed processes."""
        return leftovers(self.root / "tmp")

    def object(self, kind: str, sha256: str) -> Path:
        """The folder of an artifact, whether it exists or not."""
        return self.root / "objects" / kind / sha256[:2] / sha256

    def _index(self, stage: str, key: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", stage) or not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"stage {stage!r} and key {key!r} are not a stage name and a SHA-256")
        return self.root / "index" / stage / f"{key}.json"

    def _lock(self, stage: str, key: str) -> Path:
        return self.root / "locks" / f"{stage}-{key}.lock"

    def _scratch(self, stage: str, key: str) -> Path:
        return self.workspace / "work" / stage / key[:16]

    def _damage(self, manifest: Manifest) -> str | None:
        if digest_entries(manifest.files) != manifest.sha256:
            return "its list of files does not match its digest"
        return find_damage(manifest.path, manifest.files, self._digests)

    def read_entry(self, index: Path, *, forget: bool = False) -> Manifest | None:
        """The manifest in an index entry; None if it is missing or damaged.

        Args:
            forget: remove a damaged entry.
        """
        try:
            entry = json.loads(index.read_bytes())
            if digest_json(entry["manifest"]) != entry["sha256"]:
                raise ValueError("its checksum does not match")
            manifest = Manifest.model_validate(entry["manifest"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (IsADirectoryError, ValueError, KeyError, TypeError, ValidationError) as error:
            if forget:
                log.warning("index entry %s is damaged (%s); its stage will run again", index, error)
                with suppress(OSError):
                    remove(index)
            return None
        # The entry holds a path relative to the store, so that workspaces can be moved.
        return manifest.model_copy(update={"uri": (self.root / manifest.uri).as_uri()})

    def _write_entry(self, path: Path, manifest: Manifest) -> Path:
        inside = manifest.path.relative_to(self.root).as_posix()
        facts = manifest.model_copy(update={"uri": inside}).model_dump(mode="json")
        path.write_text(json.dumps({"sha256": digest_json(facts), "manifest": facts}, indent=1))
        sync(path)
        return path

    def _discard(self, folder: Path) -> None:
        """Remove an object. It is renamed first, so that a kill leaves no partial object in the store."""
        with self.temporary() as temporary, suppress(FileNotFoundError):
            os.rename(folder, temporary / "discarded")

    @contextmanager
    def _object_lock(self, sha256: str) -> Iterator[None]:
        path = self.root / "locks" / f"object-{sha256[:8]}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, poll_interval=0.05):
            yield

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A temporary folder of this process under `store/tmp`, always removed at the end."""
        folder = temporary_in(self.root / "tmp")
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _children(folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, so that such a metric does not prevent storing the artifact."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named_files(source: Mapping[str, Path | str]) -> dict[str, Path]:
    files = {}
    for name, path in sorted(source.items()):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or name == ".":
            raise ValueError(f"{name!r} is not a plain relative path inside an artifact")
        # Resolve symbolic links, so that the file's content is stored.
        files[name] = Path(path).resolve(strict=True)
    return files


def _stage_files(files: Mapping[str, Path], scratch: Path, staged: Path) -> None:
    """Fill a folder of the store's file system with an artifact's files, and flush it."""
    for name, path in files.items():
        part = staged / name
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not path.is_relative_to(scratch):
                raise OSError("a file of the user, which must not share its content with the store")
            # Costs nothing, and keeps the working folder complete until the artifact is safe.
            os.link(path, part)
        except OSError:  # also from another disk, or on one without links
            shutil.copyfile(path, part)
        sync(part)
    for where, _, _ in os.walk(staged):
        sync(Path(where))
