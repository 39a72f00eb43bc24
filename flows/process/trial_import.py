"""Whether a deployment's flow can be imported in the folder that its runs start in.

Prefect puts the work pool's `working_dir` in front of everything else that Python imports from, whatever
PYTHONSAFEPATH says. A package called flows, tasks or deploy there would take the place of the installed one.
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
import importlib, sys
for name in sys.argv[1:]:
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
            "Rename what bears the name of an installed package there, or name another working_dir",
        )


@functools.cache
def _trial(module: str, folder: str, environment: tuple[tuple[str, str], ...]) -> str:
    """What is wrong; nothing where the import finds what it finds here."""
    surroundings = dict(os.environ) | dict(environment)
    surroundings["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, surroundings.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _TRIAL, module, *_PACKAGES],
        cwd=folder,
        env=surroundings,
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
