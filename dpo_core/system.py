"""Operating system helpers: atomic writes, digests, processes, modules of a package."""

import ctypes
import errno
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import signal
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from pydantic import BaseModel

MAX_BYTES = 2**20
"""Size limit of `read_small`. Recipes have a few kB, the longest known chat template about 20 kB."""

JOB_PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "gguf", "safetensors")
"""The packages that only jobs need, and commands that compute with a model in their own process."""
INSTALL_JOB_PACKAGES = "pip install 'dpo-pipeline[train]'"

_PR_SET_PDEATHSIG = 1


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file completely or not at all.

    Args:
        durable: even if the machine loses power or the disk fails.
    """
    # On other nodes there may be processes of the same number.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        if durable:  # otherwise the new name may reach the disk before the content, leaving an empty file
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def digest_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value: keys sorted, spacing fixed.

    Takes a pydantic model, or dicts, lists, strings, numbers, booleans, None and paths.

    Raises:
        TypeError: a value has no JSON form.
        ValueError: a number is NaN or infinite.
    """

    def plain(part: Any) -> Any:
        if isinstance(part, BaseModel):
            return part.model_dump(mode="json")
        if isinstance(part, os.PathLike):
            return os.fspath(part)
        raise TypeError(f"a {type(part).__name__} cannot be part of a digest")

    return digest_text(
        json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=plain
        )
    )


def digest_listed(files: Mapping[str, Path]) -> str:
    """SHA-256 of files with their names, in the order given."""
    return digest_text("".join(f"{name}\0{digest_file(path)}\n" for name, path in files.items()))


def remove(path: Path) -> None:
    """Remove a file, folder or link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest_file(path: Path | str) -> str:
    """SHA-256 of a file's content, read in blocks of 2 MB."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_small(path: Path) -> str:
    """The text of a small file.

    Raises:
        OSError: the file cannot be opened, is not a regular file (a device or pipe may never end), or has
            more than `MAX_BYTES`.
        UnicodeDecodeError: it is not UTF-8.
    """
    # Open without blocking: a pipe would wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES // 2**20} MiB", str(path))
    return content.decode("utf-8")


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot, which does not change if the machine's clock is set.

    psutil's `create_time` is a time of day and changes with the clock.

    Raises:
        psutil.NoSuchProcess: the process does not exist.
    """
    try:
        # The process name may contain any character; it ends at the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        raise psutil.NoSuchProcess(pid) from None
    except OSError:  # the process or /proc does not exist
        return int(psutil.Process(pid).create_time())
    return int(fields[19])


def end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent ends, also if the parent is killed (Linux).

    More exactly: when the thread that started this process ends.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGTERM)


def ending_with_parent(command: list[str]) -> list[str]:
    """A command whose process gets SIGTERM when the thread that starts it ends, as `end_with_parent`.

    Where util-linux is missing, the command is returned unchanged.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command


def import_modules(package: ModuleType, *, without: tuple[str, ...] = ()) -> list[ModuleType]:
    """Import the modules of a package, sorted by name; registries find their entries with it.

    Args:
        without: names of modules to leave out, such as the registry's own.
    """
    names = [entry.name for entry in pkgutil.iter_modules(package.__path__) if entry.name not in without]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]
