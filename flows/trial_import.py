"""Whether a deployment's flow can be imported in the folder that its runs start in.

Prefect starts a run with `python -m` in the work pool's `working_dir`, and Python looks there first unless
PYTHONSAFEPATH is set: a package called tasks or deploy there takes the place of the installed one. Prefect
itself looks there first for the module of the entrypoint, whatever is set: a package called flows has to go.
"""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpo_core.errors import RecipeError

_PACKAGES = ("flows", "tasks", "deploy", "expectations", "dpo_core")
_TRIAL = """\
import importlib, os, sys
sys.path.insert(0, os.getcwd())  # as Prefect does (prefect.utilities.importtools)
print("from", importlib.import_module(sys.argv[1]).__file__)
del sys.path[0]
for name in sys.argv[2:]:
    print("from", importlib.import_module(name).__file__)
"""


def check_import(deployment: Any) -> None:
    """Import the entrypoint's module as a run would, where the folder is one of this machine.

    Raises:
        RecipeError: the import fails there, or finds something else than here.
    """
    variables = deployment.work_pool.job_variables
    folder, module = variables.get("working_dir"), deployment.entrypoint.rpartition(".")[0]
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return
    given = dict(variables.get("env") or {})
    given |= {name.removeprefix("env."): value for name, value in variables.items() if name[:4] == "env."}
    environment = tuple(sorted((name, str(value)) for name, value in given.items() if value is not None))
    if said := _trial(module, folder, environment):
        raise RecipeError(
            f"{deployment.name}: in working_dir {folder}, where its runs start, {said}",
            'Set PYTHONSAFEPATH: "1" in work_pool.job_variables.env; if set, rename what bears the name '
            "of an installed package there, or name another working_dir",
        )


@functools.cache
def _trial(module: str, folder: str, environment: tuple[tuple[str, str], ...]) -> str:
    """What is wrong; nothing where the import finds what it finds here."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _TRIAL, module, *_PACKAGES],
        cwd=folder,
        env=surroundings | dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line.removeprefix("from ") for line in done.stdout.splitlines() if line.startswith("from ")]
    here = [str(importlib.import_module(name).__file__) for name in (module, *_PACKAGES)]
    for other, ours in zip(found, here, strict=False):
        if os.path.realpath(other) != os.path.realpath(ours):
            return f"Python finds {other} in place of the installed package"
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return f"{module} cannot be imported ({said})"
    return ""
