"""What the image installs, read from pyproject.toml: `python requirements.py VARIANT EXTRAS`.

Without the package itself, so that the layer with torch outlives changes of the code.
"""

import re
import sys
import tomllib
from pathlib import Path

VARIANTS = {"cpu": "+cpu", "cuda": ""}


def requirements(folder: Path, variant: str, extras: list[str]) -> list[str]:
    """The dependencies of the package and of the extras, with the torch of the variant."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    unknown = [name for name in extras if name not in optional]
    if unknown or variant not in VARIANTS:
        known = f"variants {', '.join(VARIANTS)}; extras {', '.join(optional)}"
        raise SystemExit(f"there is no {', '.join(unknown) or variant}; known are {known}")
    locked = re.search(r"^torch==([0-9.]+)", (folder / "constraints.txt").read_text(), re.MULTILINE)
    assert locked, "constraints.txt names no torch"
    wanted = [*project["dependencies"], *(one for name in extras for one in optional[name])]
    return [*wanted, f"torch=={locked[1]}{VARIANTS[variant]}"]


if __name__ == "__main__":
    print("\n".join(requirements(Path(), sys.argv[1], [one for one in sys.argv[2].split(",") if one])))
