"""Prints the requirements of an image, read from pyproject.toml: `python requirements.py VARIANT EXTRAS`.

The package itself is left out, so that a change of the code does not install torch again.
"""

import re
import sys
import tomllib
from pathlib import Path

VARIANTS: dict[str, str | None] = {"worker": None, "cpu": "+cpu", "cuda": ""}
"""By name of the image, the suffix of its torch's version; None: an image without torch."""


def requirements(folder: Path, variant: str, extras: list[str]) -> list[str]:
    """The dependencies of the package and of the extras; except for a worker also those of jobs.

    Raises:
        SystemExit: there is no such variant or extra.
    """
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    unknown = [name for name in extras if name not in optional]
    if unknown or variant not in VARIANTS:
        known = f"variants {', '.join(VARIANTS)}; extras {', '.join(optional)}"
        raise SystemExit(f"there is no {', '.join(unknown) or variant}; known are {known}")
    suffix = VARIANTS[variant]
    if suffix is None:
        return [*project["dependencies"], *(one for name in extras for one in optional[name])]
    locked = re.search(r"^torch==([0-9.]+)", (folder / "constraints.txt").read_text(), re.MULTILINE)
    assert locked, "constraints.txt names no torch"
    wanted = [*project["dependencies"], *(one for name in ["train", *extras] for one in optional[name])]
    return [*wanted, f"torch=={locked[1]}{suffix}"]


if __name__ == "__main__":
    print("\n".join(requirements(Path(), sys.argv[1], [one for one in sys.argv[2].split(",") if one])))
