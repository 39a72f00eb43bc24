"""The content-addressed store of artifacts that makes a stage run once.

    store/objects/<kind>/<sha256[:2]>/<sha256>/   the artifact's files, never changed in place
    store/index/<stage>/<key>.json                the manifest of a stage's result
    store/locks/                                  one lock per key, so that two runs share the work
    store/tmp/                                    unfinished files; see `Store.sweep`
    work/<stage>/<key[:16]>/                      a stage's working folder; survives a kill

All paths are in the workspace. Files and folders are completed under a temporary name and renamed, the index
entry last. A kill therefore leaves a complete artifact or none.
"""

import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from pydantic import JsonValue, ValidationError

from dpo_core.errors import StageFailed
from dpo_core.system import remove, sync
from tasks.store.files import disk_errors, open_workspace
from tasks.store.locks import locked
from tasks.store.manifest import (
    Digests,
    Manifest,
    digest_config,
    digest_entries,
    digest_files,
    find_damage,
    list_files,
)
from tasks.store.owner import Owner, this_process

log = logging.getLogger(__name__)

# The process behind an unfinished folder of another machine cannot be checked; older folders are removed.
_FOREIGN_TMP_SECONDS = 24 * 3600.0
_HELD = "held"  # lock file in a folder under `store/tmp`, held while a process uses the folder
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

    def lookup(self, stage: str, key: str, *, verify: bool = True) -> Manifest | None:
        """The stage's result for this key, or None if the stage has to run.

        The artifact's file names, sizes and digests are compared with its manifest first. A damaged or
        missing artifact is logged, removed and reported as None. `verify=False` skips the comparison.

        Raises:
            RecipeError: the store is not readable.
        """
        index = self._index(stage, key)
        with disk_errors(index, "reading the store"):
            manifest = self._read_index(index)
            if manifest is None:
                return None
            damage = self._damage(manifest) if verify else None
            if damage is None:
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
            manifest = self._read_index(index, forget=False)
            return manifest if manifest is not None and self._damage(manifest) is None else None

    def history(self, stage: str) -> list[Manifest]:
        """The stage's results for all keys; changes nothing."""
        paths = self._children(self.root / "index" / stage)
        entries = [self._read_index(path, forget=False) for path in paths]
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
        *,
        keep_work: bool = False,
    ) -> Manifest:
        """Store a stage's result under its key, then remove the stage's working folder.

        Args:
            source: the folder to store, or the files to store by their name inside the artifact. Files in the
                stage's working folder are moved, others copied.
            keep_work: keep the working folder and copy from it.

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
            entries = digest_files(files)
            sha256 = digest_entries(entries)
            target = self.object(about.kind, sha256)
            manifest = Manifest(
                kind=about.kind,
                uri=target.as_uri(),
                sha256=sha256,
                schema_version=1,
                rows=about.rows,
                parameters=about.parameters,
                parents=tuple(about.parents),
                stage=stage,
                stage_version=about.stage_version,
                config_digest=about.config_digest,
                extra=_finite(dict(about.extra)),
                files=entries,
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            index.parent.mkdir(parents=True, exist_ok=True)
            # Lock both object and index, so that no check of the same content removes the object in between.
            with self._object_lock(sha256), self._temporary() as temporary:
                # Everything that needs disk space comes first; only renames follow.
                entry = self._write_entry(temporary / index.name, manifest)
                if os.path.lexists(target) and find_damage(target, entries, self._digests) is not None:
                    self._discard(target)
                own = None if keep_work else scratch
                staged = None if os.path.lexists(target) else self._stage_files(files, folder, own, temporary)
                with self.guard():  # keeps `dpo gc` from removing the object before its entry exists
                    if not os.path.lexists(target):
                        os.rename(staged or self._stage_files(files, folder, own, temporary), target)
                        sync(target.parent)
                    os.replace(entry, index)
                sync(index.parent)
        if not keep_work:
            shutil.rmtree(scratch, ignore_errors=True)
        return manifest

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

    def sweep(self) -> int:
        """Remove the unfinished folders of killed processes; returns the number of folders removed."""
        removed = 0
        # One at a time: each working folder is locked while it is checked and removed.
        for folder in chain(self.leftovers(), self._used_scratch()):
            shutil.rmtree(folder, ignore_errors=True)
            removed += not folder.exists()
        return removed

    def leftovers(self) -> list[Path]:
        """The unfinished folders of killed processes."""
        return [folder for folder in self._children(self.root / "tmp") if not _has_owner(folder)]

    def _used_scratch(self) -> Iterator[Path]:
        """Working folders of finished stages, left by a kill between index entry and removal."""
        for stage in self._children(self.workspace / "work"):
            keys = {path.stem[:16]: path.stem for path in self._children(self.root / "index" / stage.name)}
            for folder in self._children(stage):
                if folder.name in keys:
                    # A process that uses the folder holds the lock: it may be rebuilding a damaged artifact.
                    lock = FileLock(self._lock(stage.name, keys[folder.name]), timeout=0)
                    with suppress(Timeout, OSError), lock:
                        yield folder

    def object(self, kind: str, sha256: str) -> Path:
        """The folder of an artifact, whether it exists or not."""
        return self.root / "objects" / kind / sha256[:2] / sha256

    def usage(self) -> dict[str, int]:
        """Bytes on disk by kind of artifact; the stages' working folders are `work`."""
        places = {folder.name: folder for folder in self._children(self.root / "objects")}
        places["work"] = self.workspace / "work"
        sizes = dict.fromkeys(places, 0)
        for name, folder in places.items():
            for where, _, files in os.walk(folder):
                for file in files:
                    with suppress(FileNotFoundError):  # an active run may remove its working folder
                        sizes[name] += os.lstat(os.path.join(where, file)).st_size
        return sizes

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

    def _read_index(self, index: Path, *, forget: bool = True) -> Manifest | None:
        try:
            entry = json.loads(index.read_bytes())
            if digest_config(entry["manifest"]) != entry["sha256"]:
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
        path.write_text(json.dumps({"sha256": digest_config(facts), "manifest": facts}, indent=1))
        sync(path)
        return path

    def _stage_files(
        self, files: Mapping[str, Path], folder: Path | None, own: Path | None, temporary: Path
    ) -> Path:
        """A complete, flushed folder on the store's file system, ready to be renamed.

        `own` is the working folder whose files may be moved; None copies everything.
        """
        if folder and own and folder.is_relative_to(own) and _same_device(folder, temporary):
            staged, parts = folder, files
        else:
            staged, parts = temporary / "artifact", {}
            for name, path in files.items():
                part = parts[name] = staged / name
                part.parent.mkdir(parents=True, exist_ok=True)
                # A hard link costs nothing and keeps the working folder complete until the artifact is safe.
                if own and path.is_relative_to(own) and _same_device(path, temporary):
                    os.link(path, part)
                else:
                    shutil.copyfile(path, part)
        for path in parts.values():
            sync(path)
        for where in {place for path in parts.values() for place in path.parents}:
            if where.is_relative_to(staged):
                sync(where)
        return staged

    def _discard(self, folder: Path) -> None:
        """Remove an object. It is renamed first, so that a kill leaves no partial object in the store."""
        with self._temporary() as temporary, suppress(FileNotFoundError):
            os.rename(folder, temporary / "discarded")

    @contextmanager
    def _object_lock(self, sha256: str) -> Iterator[None]:
        path = self.root / "locks" / f"object-{sha256[:8]}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, poll_interval=0.05):
            yield

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A temporary folder of this process under `store/tmp`, always removed at the end."""
        me = this_process()
        name = f"{me.host}+{me.pid}+{me.born}+{uuid.uuid4().hex[:8]}"
        folder = self.root / "tmp" / name
        folder.mkdir(parents=True)
        try:
            with FileLock(folder / _HELD):
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


def _same_device(first: Path, second: Path) -> bool:
    return first.stat().st_dev == second.stat().st_dev


def _is_held(temporary: Path) -> bool:
    try:
        with FileLock(temporary / _HELD, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # nobody works on a read-only disk
        return False


def _has_owner(temporary: Path) -> bool:
    """Whether the process that created a folder under `store/tmp` is still alive."""
    try:
        host, pid, born, _ = temporary.name.split("+")
        owner = Owner(host=host, pid=int(pid), born=int(born))
        if not owner.is_here():
            return time.time() - temporary.stat().st_mtime < _FOREIGN_TMP_SECONDS
        if owner == this_process():  # this process could not remove it when the disk failed
            return _is_held(temporary)
        return not owner.is_gone()
    except (ValueError, FileNotFoundError):
        return False
