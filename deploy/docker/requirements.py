"""Prints the requirements of an image, read from pyproject.toml: `python requirements.py VARIANT EXTRAS`.

The package itself is left out, so that a change of the code does not install torch again.
"""

import re
import sys
import tomllib
from pathlib import Path

VARIANTS: dict[str, str | None] = {"worker": None, "cpu": "+cpu", "cuda": ""}
"""The suffix of the torch version for each image; None: an image without torch."""


def requirements(folder: Path, variant: str, extras: list[str]) -> list[str]:
    """The dependencies of the package and the extras, and those of jobs unless the variant is `worker`.

    Raises:
        SystemExit: the variant or an extra does not exist.
    """
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    unknown = [name for name in extras if name not in optional]
    if unknown or variant not in VARIANTS:
        known = f"variants {', '.join(VARIANTS)}; extras {', '.join(optional)}"
        raise SystemExit(f"there is no {', '.join(unknown) or variant}; choose from {known}")
    suffix = VARIANTS[variant]
    if suffix is None:
        return [*project["dependencies"], *(package for name in extras for package in optional[name])]
    locked = re.search(r"^torch==([0-9.]+)", (folder / "constraints.txt").read_text(), re.MULTILINE)
    assert locked, "constraints.txt names no torch"
    extras = ["train", *extras]
    packages = [*project["dependencies"], *(package for name in extras for package in optional[name])]
    return [*packages, f"torch=={locked[1]}{suffix}"]


if __name__ == "__main__":
    print("\n".join(requirements(Path(), sys.argv[1], [name for name in sys.argv[2].split(",") if name])))
