"""The temporary server of a run: it answers, ends with its run, and says why it cannot start."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

CODE = (
    "from flows.process.environment import keep_quiet; keep_quiet()\n"
    "from flows.process import temporary_server as own\n"
    "from flows.process.prefect_server import server_address\n"
    "own.start_temporary_server()\n"
    "own.wait_for_temporary_server()\n"
    "from prefect.client.orchestration import get_client\n"
    "with get_client(sync_client=True) as client:\n"
    "    assert client.read_flow_runs() == []\n"
    "    assert own.is_temporary(str(client.api_url).rstrip('/'))\n"
    "assert server_address() is None, 'nobody configured it'\n"
    "print(own._server._process.pid, flush=True)\n"
    "import time; time.sleep(600)\n"
)


def start(home: Path, **more: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(home), **more}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", CODE], env=environment, stdout=pipe, stderr=pipe, text=True
    )


def test_it_answers_and_ends_even_where_its_run_is_killed(tmp_path: Path) -> None:
    run = start(tmp_path)
    assert run.stdout is not None
    line = run.stdout.readline()
    assert line, run.communicate()[1]
    server = psutil.Process(int(line))
    run.kill()
    run.wait()
    server.wait(timeout=30)


def test_the_reason_is_told_where_it_cannot_start(tmp_path: Path) -> None:
    run = start(tmp_path, PREFECT_API_DATABASE_CONNECTION_URL="sqlite+aiosqlite:////nowhere/prefect.db")
    _, error = run.communicate(timeout=300)
    assert run.returncode == 1
    last = error.strip().splitlines()[-1]
    assert "Prefect's temporary server did not start (" in last
    assert "Run again, or set PREFECT_API_URL" in last


def test_a_configured_server_is_used() -> None:
    code = (
        "from flows.process import temporary_server as own; own.start_temporary_server()\n"
        "own.wait_for_temporary_server()\n"
        "assert own._server is None\n"
    )
    environment = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
