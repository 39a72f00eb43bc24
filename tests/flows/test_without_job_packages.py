"""The modules that a worker loads, in a process that has none of the packages of jobs."""

import subprocess
import sys

from dpo_core.system import JOB_PACKAGES

MODULES = ["flows.alignment", "flows.deployed", "flows.run_lifecycle", "tasks.preflight"]


def test_the_modules_of_the_flow_are_imported_without_the_packages_of_jobs() -> None:
    missing = f"import sys; sys.modules |= dict.fromkeys({JOB_PACKAGES}); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", missing], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
