"""Which Python code that ships with models may run: only what the user has trusted, file by file.

`model.trust_remote_code` is set for one model, and its checkpoints are read in a dozen places and processes:
by policies, references, reward models, caches and suites. Each of them asks here, and none passes a flag on.
A checkpoint that training writes carries the same files, and so does a job the digests of those trusted.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

_trusted: set[str] = set()


def trust(folder: Path) -> None:
    """Let the Python files of a checkpoint folder run in this process, wherever else they lie."""
    _trusted.update(_digests(folder))


def trust_digests(digests: Iterable[str]) -> None:
    """Let files run that another process has trusted: what its `trusted` returned."""
    _trusted.update(digests)


def trusted() -> list[str]:
    """sha256 of every file that may run."""
    return sorted(_trusted)


def trusts(folder: Path) -> bool:
    """Whether the code of a checkpoint may run: it lies in the folder, and every file of it is trusted."""
    digests = _digests(folder)
    return bool(digests) and _trusted.issuperset(digests) and not _names_other_repositories(folder)


def _digests(folder: Path) -> list[str]:
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _names_other_repositories(folder: Path) -> bool:
    """Whether classes that are loaded come from elsewhere: a name such as `owner/repository--file.Class`."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        known = json.loads(path.read_bytes()).get("auto_map", {}) if path.is_file() else {}
        loaded = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        if any("--" in json.dumps(known.get(kind)) for kind in loaded):
            return True
    return False
