"""Checks that a deployment's flow can be imported in the folder in which its runs start.

Prefect puts the work pool's `working_dir` first on Python's import path, regardless of PYTHONSAFEPATH. A
package there called flows, tasks or deploy would replace the installed one.
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
    """Import the entrypoint's module as a run would, if the folder is on this machine.

    Raises:
        RecipeError: the import fails there, or imports another package than here.
    """
    variables = deployment.work_pool.job_variables
    folder, module = variables.get("working_dir"), deployment.entrypoint.rpartition(".")[0]
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return
    env = dict(variables.get("env") or {})
    env |= {name.removeprefix("env."): value for name, value in variables.items() if name[:4] == "env."}
    environment = tuple(sorted((name, str(value)) for name, value in env.items() if value is not None))
    if problem := _trial(module, folder, environment):
        raise RecipeError(
            f"{deployment.name}: in working_dir {folder}, where its runs start, {problem}",
            "Rename the folder or file with the name of an installed package, or set another working_dir",
        )


@functools.cache
def _trial(module: str, folder: str, environment: tuple[tuple[str, str], ...]) -> str:
    """The problem with the import; empty if it imports the same files as here."""
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
    imported = [line.removeprefix("from ") for line in done.stdout.splitlines() if line.startswith("from ")]
    here = [str(importlib.import_module(name).__file__) for name in (module, *_PACKAGES)]
    for other, installed in zip(imported, here, strict=False):
        if os.path.realpath(other) != os.path.realpath(installed):
            return f"Python imports {other} in place of the installed package"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return f"{module} cannot be imported ({last})"
    return ""
