"""Decides which Python code that ships with models may run: only files that the user trusts, by digest.

`model.trust_remote_code` is set for one model, and its checkpoints are read in a dozen places and processes:
by policies, references, reward models, caches and suites. All of them ask this module, so that no flag is
passed on. A checkpoint that training writes contains the same files, and a job file the trusted digests.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from dpo_core.system import digest_file

_trusted: set[str] = set()


def trust(folder: Path) -> None:
    """Let the Python files of a checkpoint folder, and copies of them elsewhere, run in this process."""
    _trusted.update(_digests(folder))


def trust_digests(digests: Iterable[str]) -> None:
    """Let files run that another process trusts; `digests` is what its `trusted_digests` returned."""
    _trusted.update(digests)


def trusted_digests() -> list[str]:
    """sha256 of every file that may run."""
    return sorted(_trusted)


def is_trusted(folder: Path) -> bool:
    """Whether a checkpoint has code, all of it in its folder and trusted."""
    digests = _digests(folder)
    return bool(digests) and _trusted.issuperset(digests) and not _names_other_repositories(folder)


def _digests(folder: Path) -> list[str]:
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
    return [digest_file(file) for file in files]


def _names_other_repositories(folder: Path) -> bool:
    """Whether it loads classes of other repositories, named as `owner/repository--file.Class`."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        auto_map = json.loads(path.read_bytes()).get("auto_map", {}) if path.is_file() else {}
        loaded = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        if any("--" in json.dumps(auto_map.get(kind)) for kind in loaded):
            return True
    return False
