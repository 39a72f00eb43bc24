"""The temporary server of a run: it answers, ends with its run, and says why it cannot start."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from dpo_core.errors import RecipeError
from flows.process import temporary_server as own

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


@pytest.mark.slow  # starts one; those of runs in the tests share theirs, and its end is tested below
def test_it_answers_and_ends_even_where_its_run_is_killed(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(tmp_path)}
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, "-c", CODE], env=environment, stdout=pipe, stderr=pipe, text=True)
    assert run.stdout is not None
    line = run.stdout.readline()
    assert line, run.communicate()[1]
    server = psutil.Process(int(line))
    run.kill()
    run.wait()
    server.wait(timeout=30)


def test_the_reason_is_told_where_it_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that writes its last words and ends."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such database >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(own.sys, "executable", str(program))
    server = own.TemporaryServer()
    with pytest.raises(RecipeError, match=r"temporary server did not start \(no such database\)") as error:
        server.wait()
    assert "set PREFECT_API_URL" in error.value.remedy


def test_the_end_of_its_input_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is where its run has ended, however."""
    ended: list[int] = []
    monkeypatch.setattr(own.sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(own, "_LAST_STATES", 0.0)
    monkeypatch.setattr(own.os, "_exit", ended.append)
    server = SimpleNamespace(should_exit=False)
    own._end_with_parent(server)
    assert server.should_exit
    assert ended == [0]


def test_a_configured_server_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_server", None)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        own.start_temporary_server()
    own.wait_for_temporary_server()
    assert own._server is None
