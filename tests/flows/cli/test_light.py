"""What commands load: fresh processes, and their times on a quiet machine."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_core.system import JOB_PACKAGES
from tests.support.runs.tiny_run import Bench, prefect_address

HEAVY = {
    *("torch", "transformers", "deepspeed", "datasets", "scipy", "numpy", "pandas", "pyarrow", "matplotlib"),
    *("prefect", "mlflow", "great_expectations"),
}
COMMANDS = [["--help"], ["run", "--help"], ["runs"], ["config", "show", "demo"], ["config", "schema"]]
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
REPORT = (
    "import json, sys\n"
    "from flows.cli.main import main\n"
    "try:\n"
    "    main()\n"
    "finally:\n"
    "    print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)\n"
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_quick_command_loads_no_heavy_package(command: list[str], tmp_path: Path) -> None:
    called = [sys.executable, "-c", REPORT, *command]
    done = subprocess.run(called, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip()
    assert not HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


def test_without_the_packages_of_jobs_a_worker_starts_and_a_command_names_their_extra(tmp_path: Path) -> None:
    modules = "flows.alignment, flows.deployed, flows.run_lifecycle, tasks.preflight"
    without = f"import sys; sys.modules |= dict.fromkeys({JOB_PACKAGES}); import {modules}\n"
    without += "print('imported', flush=True); from flows.cli.main import main; main()"
    called = [sys.executable, "-c", without, "plan", "demo"]
    done = subprocess.run(called, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "imported\n"), done.stderr
    told = done.stderr.splitlines()[-1]
    assert told == "error: torch is not installed. Run: pip install 'dpo-pipeline[train]'"


def test_a_run_prints_its_first_line_before_it_loads_anything_heavy(tmp_path: Path) -> None:
    ends_there = (
        "import sys; sys.modules['flows.process.temporary_server'] = None\n"  # the next import after the line
    )
    called = [sys.executable, "-c", ends_there + REPORT, "run", "demo"]
    done = subprocess.run(called, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.stdout == f"recipe demo, workspace {tmp_path / 'runs'}; starting takes about 10 s\n"
    assert "flows.process.temporary_server" in done.stderr
    assert not HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.slow  # a run in processes that share nothing with the tests'; the import is tested above
def test_a_complete_run_loads_no_torch_and_takes_little_memory(bench: Bench) -> None:
    """The process of a flow only orchestrates: everything that computes with a model is a job's."""
    own = bench.copy("footprint")
    program = Path(__file__).parents[2] / "support" / "runs" / "footprint.py"
    done = subprocess.run(
        [sys.executable, "-P", program, "run", own.recipe, "--json"],
        env=own.environment()
        | {"DPO_FOOTPRINT": str(own.folder / "footprint.json"), "PREFECT_API_URL": prefect_address()},
        cwd=own.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ran" in own.states(json.loads(done.stdout)).values()
    footprint = json.loads((own.folder / "footprint.json").read_text())
    assert {"torch", "transformers", "deepspeed", "great_expectations"}.isdisjoint(footprint["packages"])
    assert footprint["peak_bytes"] < 600e6


@pytest.mark.bench
def test_a_run_prints_its_first_line_within_a_second(tmp_path: Path) -> None:
    def seconds() -> float:
        start = time.monotonic()
        command = [Path(sys.executable).with_name("dpo"), "run", "demo"]
        with subprocess.Popen(command, cwd=tmp_path, env=COMPILED, stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            assert run.stdout.readline().startswith(b"recipe demo")
            taken = time.monotonic() - start
            run.kill()
        return taken

    seconds()  # compiles
    assert statistics.median(seconds() for _ in range(5)) < 1


@pytest.mark.bench
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_quick_command_answers_in_seven_tenths_of_a_second(command: list[str], tmp_path: Path) -> None:
    def seconds() -> float:
        start = time.monotonic()
        called = [Path(sys.executable).with_name("dpo"), *command]
        subprocess.run(called, cwd=tmp_path, env=COMPILED, check=True, capture_output=True)
        return time.monotonic() - start

    seconds()  # compiles
    assert statistics.median(seconds() for _ in range(5)) < 0.7
