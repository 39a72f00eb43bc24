"""Provenance of a run: code version, packages, machine and command line."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from dpo_core.redaction import redact


def source_tags() -> dict[str, str]:
    """MLflow tags of the code: commit, branch and dirty flag from git, else the commit in $DPO_GIT_COMMIT."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), "--no-optional-locks", *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return process.stdout.strip()

    tags = {"mlflow.source.name": "dpo", "mlflow.source.type": "LOCAL"}
    try:
        # An installed package may be in a folder of another repository.
        git("ls-files", "--error-unmatch", here.name)
        tags["mlflow.source.git.commit"] = git("rev-parse", "HEAD")
        tags["mlflow.source.git.branch"] = git("rev-parse", "--abbrev-ref", "HEAD")
        tags["mlflow.source.git.dirty"] = str(bool(git("status", "--porcelain", "-uno"))).lower()
    except (OSError, subprocess.SubprocessError):
        if commit := os.environ.get("DPO_GIT_COMMIT"):
            tags["mlflow.source.git.commit"] = commit
    return tags


def environment() -> dict[str, Any]:
    """Versions of Python and packages, and facts of the machine."""
    packages = dict(_name_and_version(d) for d in importlib.metadata.distributions())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": dict(sorted(packages.items(), key=lambda item: str(item[0]).lower())),
    }


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """Read of the first lines alone: `metadata` parses the whole description, a second for all packages."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    fields = dict(line.partition(": ")[::2] for line in text.partition("\n\n")[0].splitlines())
    return fields.get("Name", ""), fields.get("Version", "")


def hardware() -> str:
    """The machine in one line."""
    memory = psutil.virtual_memory().total / 2**30
    gpus = ", ".join(_gpu_names()) or "no GPU"
    return f"{os.cpu_count()} CPU cores, {memory:.0f} GiB memory, {gpus}"


def _gpu_names() -> list[str]:
    """GPU names from NVIDIA's driver, because PyTorch may not be installed here."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        names.append(fields.get("Model", "GPU").strip())
    return names


def command_line() -> str:
    """The command that started this process, as a person would type it."""
    name = Path(sys.argv[0]).name
    return redact(shlex.join(["dpo" if name == "main.py" else name, *sys.argv[1:]]))
