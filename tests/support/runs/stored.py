"""What the tests of the store share: making artifacts, and looking whether a store is whole."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dpo_core.system import digest_json
from tasks.store.manifest import Manifest, digest_folder, stage_key
from tasks.store.store import ArtifactInfo, Store

REPO = Path(__file__).resolve().parents[3]
CONFIG = digest_json({"lr": 1e-6})
KEY = stage_key("sft", 1, CONFIG, [])
INFO = ArtifactInfo("model", 1, CONFIG)


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make(store: Store, files: Mapping[str, bytes], key: str = KEY, stage: str = "sft") -> Manifest:
    folder = write(store.begin(stage, key) / "artifact", files)
    return store.commit(stage, key, folder, ArtifactInfo("model", 1, CONFIG, rows=1))


def assert_clean(store: Store) -> None:
    """Every object is whole, every index entry leads to one, and nothing unfinished is left."""
    for folder in (store.root / "objects").glob("*/*/*"):
        assert digest_folder(folder) == folder.name
    for entry in (store.root / "index").glob("*/*.json"):
        assert store.lookup(entry.parent.name, entry.stem) is not None
    assert not list((store.root / "tmp").glob("*"))  # the first thing that a writer makes


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]
