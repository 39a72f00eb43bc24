"""What a command loads before it has answered: fresh processes, and their times on a quiet machine."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = {
    *("torch", "transformers", "deepspeed", "datasets", "scipy", "pandas", "pyarrow", "matplotlib"),
    *("prefect", "mlflow", "great_expectations"),
}
COMMANDS = [["--help"], ["run", "--help"], ["runs"], ["config", "show", "demo"], ["config", "schema"]]
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


@pytest.mark.bench
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_quick_command_answers_in_seven_tenths_of_a_second(command: list[str], tmp_path: Path) -> None:
    def seconds() -> float:
        start = time.monotonic()
        subprocess.run(
            [Path(sys.executable).with_name("dpo"), *command], cwd=tmp_path, check=True, capture_output=True
        )
        return time.monotonic() - start

    assert statistics.median(seconds() for _ in range(5)) < 0.7
