"""A real Prefect server that dies in the middle of a run, comes back or does not, or was never there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import prefect
import pytest

from tasks.runs.record import list_runs
from tests.scenarios.faults.whole import forget_from
from tests.support.runs.tiny_run import Bench
from tests.support.runs.tracked import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
AWAY = 30.0


class Server:
    """`prefect server start` on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(self.port)]
        with (self.folder / "server.log").open("a") as out:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"PREFECT_HOME": str(self.folder / "home")},
                cwd=self.folder,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.api}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the group is the server's alone
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def start(own: Bench, api: str, **more: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = own.folder / "run.log"
    with log.open("w") as output:
        flow = subprocess.Popen(
            own.command("run", str(own.recipe)),
            env=own.environment() | {"PREFECT_API_URL": api} | more,
            cwd=own.folder,
            stdout=output,
            stderr=output,
        )
    return flow, log


def until(flow: subprocess.Popen[bytes], log: Path, line: str) -> None:
    deadline = time.monotonic() + 900
    while line not in log.read_text():
        assert flow.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_server_that_is_back_in_half_a_minute_costs_nothing(finished, server: Server) -> None:
    reference, _ = finished
    own = reference.copy(f"prefect-back-{server.port}")
    forget_from(own, "train-dpo DPO")
    flow, log = start(own, server.api)
    until(flow, log, "train-dpo DPO: running")
    server.kill()
    time.sleep(AWAY)
    server.start()
    code = flow.wait(timeout=900)
    text = log.read_text()
    assert code == 0, text
    assert "Traceback" not in text
    assert own.index() == reference.index()
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.api}/flow_runs/filter", b"{}", {"Content-Type": "application/json"})
    ) as answer:
        assert b'"state_type":"COMPLETED"' in answer.read()


def test_a_run_does_without_a_server_that_is_gone_for_good(finished, server: Server) -> None:
    reference, whole = finished
    own = reference.copy(f"prefect-gone-{server.port}")
    forget_from(own, "train-dpo DPO")
    # Two tries in place of seven: the same course in less time.
    flow, log = start(own, server.api, PREFECT_CLIENT_MAX_RETRIES="2")
    until(flow, log, "train-dpo DPO: running")
    server.kill()
    code = flow.wait(timeout=900)
    text = log.read_text()
    assert code == 0, text
    (line,) = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert "the run is done, but Prefect does not know" in line
    assert f"the Prefect API at {server.api} became unreachable" in line
    assert "Traceback" not in text
    assert "to resume" not in text
    assert "Do not promote" in text, "its table is shown"
    assert own.index() == reference.index()
    newest = list_runs(own.workspace)[0]
    assert newest.status == "done"
    report = json.loads((own.workspace / "runs" / newest.run_id / "report.json").read_text())
    assert report["evaluation"] == whole["evaluation"]
    again = own.run()
    assert set(own.states(again).values()) == {"cached"}


def test_a_server_that_goes_before_the_run_is_on_record_is_as_none(bench: Bench) -> None:
    own, port = Bench(bench.folder), free_port()
    said = json.dumps(prefect.__version__)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(said)}\r\n\r\n"
    api = f"http://127.0.0.1:{port}/api"
    with socket.create_server(("127.0.0.1", port)) as listener:
        flow, log = start(own, api, PREFECT_CLIENT_MAX_RETRIES="1")
        # It answers the first question, which is for its version, and nothing more.
        listener.settimeout(300)
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall((head + said).encode())
    assert flow.wait(timeout=300) == 2, log.read_text()
    assert f"the Prefect API at {api} does not answer" in log.read_text()
    assert "to resume" not in log.read_text()


def test_no_server_at_the_start_is_said_before_anything_runs(bench: Bench) -> None:
    own = Bench(bench.folder)
    api = f"http://127.0.0.1:{free_port()}/api"
    flow, log = start(own, api)
    assert flow.wait(timeout=300) == 2
    assert f"the Prefect API at {api} does not answer" in log.read_text()
    assert "prefect server start" in log.read_text()
