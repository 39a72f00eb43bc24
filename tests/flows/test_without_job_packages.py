"""The modules that a worker loads, in a process that has none of the packages of jobs."""

import subprocess
import sys

import pytest

from dpo_core.system import JOB_PACKAGES

MODULES = ["flows.alignment", "flows.deployed", "flows.run_lifecycle", "tasks.preflight"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_flow_is_imported_without_the_packages_of_jobs(module: str) -> None:
    missing = f"import sys; sys.modules |= dict.fromkeys({JOB_PACKAGES}); import {module}"
    done = subprocess.run([sys.executable, "-c", missing], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
