"""`dpo doctor`: detects each provoked fault and reports its remedy; a sound machine has no faults."""

import json
import os
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from typer.testing import CliRunner

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.temporary import Owner, this_process
from flows.cli.main import app
from flows.commands.doctor import _IMPATIENT
from flows.process.temporary_server import start_temporary_server
from tasks.housekeeping.doctor import machine, mlflow, ports, prefect, workspace
from tasks.housekeeping.doctor.check_result import CheckResult, ok, run_checks
from tasks.preflight import _check_database
from tasks.runs.record import RunRecord, read_records, save_run
from tests.support.runs.stored import python

NOW = datetime.now(UTC)


def only(findings: Iterable[CheckResult], state: str) -> CheckResult:
    """The one finding of this state."""
    (match,) = [finding for finding in findings if finding.state == state]
    return match


def all_ok(findings: Iterable[CheckResult]) -> bool:
    return {finding.state for finding in findings} <= {"ok"}


@contextmanager
def answering(status: int, body: str = "") -> Iterator[str]:
    """A server that gives this answer to everything; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


def _package(folder: Path, name: str, release: str, *needs: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir(parents=True)
    lines = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}",
        *(f"Requires-Dist: {n}" for n in needs),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_wrong_and_missing_packages_are_named_with_what_they_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, "fastapi", "0.165.0")
    _package(tmp_path, "dpo-like", "1", "fastapi>=0.139,<0.151", "not-there-1", "pytest; extra == 'test'")
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong, missing = machine.packages("dpo-like")
    assert (wrong.state, missing.state) == ("failure", "failure")
    assert wrong.says == "fastapi 0.165.0, needed <0.151,>=0.139"
    assert "pip install 'fastapi" in wrong.remedy
    assert "not-there-1 is missing" in missing.says


def test_this_environment_is_sound() -> None:
    assert [f for f in machine.packages() if f.state == "failure"] == []


def test_a_gpu_that_torch_was_not_built_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "version", lambda _: "2.13.0+cpu")
    assert "CUDA build" in only(machine.accelerator(), "warning").remedy
    monkeypatch.setattr(machine, "version", lambda _: "2.13.0")
    assert all_ok(machine.accelerator())
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert "NVIDIA-SMI has failed" in only(machine.accelerator(), "failure").says


def test_a_proxy_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "NO_PROXY" in only(machine.network(), "warning").remedy
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert all_ok(machine.network())


def test_a_workspace_that_cannot_be_written(tmp_path: Path) -> None:
    assert all_ok(workspace.folder(tmp_path))
    assert all_ok(workspace.folder(tmp_path / "new"))
    (tmp_path / "file").write_text("")
    assert only(workspace.folder(tmp_path / "file" / "runs"), "failure")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_a_file_of_another_user(tmp_path: Path) -> None:
    assert all_ok(workspace.owner(tmp_path))
    (tmp_path / "store").mkdir()
    os.chown(tmp_path / "store", 65534, 65534)
    assert only(workspace.owner(tmp_path), "failure").remedy.startswith("sudo chown -R")


def test_a_run_whose_process_was_killed_is_stuck_and_one_at_work_is_not(tmp_path: Path) -> None:
    record = RunRecord(run_id="own", recipe="tiny", started_at=NOW, owner=this_process())
    save_run(tmp_path, record)
    assert all_ok(workspace.stuck_runs(tmp_path))
    gone = Owner(host=socket.gethostname(), pid=999999999, born=1)
    cut = record.model_copy(update={"run_id": "cut", "owner": gone, "command": "dpo run tiny"})
    save_run(tmp_path, cut)
    finding = only(workspace.stuck_runs(tmp_path), "failure")
    assert finding.says == "cut is recorded as running, but its process is gone"
    assert "dpo run tiny --resume cut" in finding.remedy
    assert "dpo gc --drop-run cut" in finding.remedy


def test_tracking_databases_of_other_versions_and_damaged_ones(
    tmp_path: Path, tracking_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert all_ok(mlflow.tracking(tmp_path))
    assert list(tmp_path.iterdir()) == [], "the check creates nothing"
    shutil.copy(tracking_database, tmp_path / "mlflow.db")
    assert all_ok(mlflow.tracking(tmp_path))
    older = tmp_path / "older"  # MLflow keeps files open that it has seen
    older.mkdir()
    shutil.copy(tracking_database, older / "mlflow.db")
    with closing(sqlite3.connect(older / "mlflow.db")) as database:
        database.execute("update alembic_version set version_num = '451aebb31d03'")
        database.commit()
    assert "mlflow db upgrade" in only(mlflow.tracking(older), "failure").remedy
    (older / "mlflow.db").write_bytes(b"no database at all, and longer than a header" * 100)
    assert "not a database" in only(mlflow.tracking(older), "failure").says


def test_a_tracking_database_that_this_user_may_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tempfile.TemporaryDirectory(prefix="100% of #") as made:
        place = Path(made)
        place.chmod(0o755)
        path = place / "mlflow.db"
        with closing(sqlite3.connect(path)) as database:
            database.execute("create table anything (number)")
        path.chmod(0o444)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            assert "readonly" in only(mlflow.tracking(place), "failure").says
            with pytest.raises(RecipeError, match="readonly"):
                _check_database(f"sqlite:///{path}", place)
        finally:
            os.seteuid(user)


def test_a_home_of_prefect_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    with temporary_settings({PREFECT_HOME: home}):
        finding = only(prefect.home(), "failure")
        assert str(home) in finding.says
        assert "PREFECT_HOME" in finding.remedy
        with (
            temporary_settings(restore_defaults={PREFECT_API_URL}),
            pytest.raises(RecipeError, match="cannot write its folder"),
        ):
            start_temporary_server()
    with temporary_settings({PREFECT_HOME: tmp_path / "new"}):
        assert all_ok(prefect.home())


@pytest.mark.parametrize(
    ("status", "body", "part"),
    [
        (401, "", "MLFLOW_TRACKING_USERNAME"),
        (403, "Invalid Host header", "--allowed-hosts"),
        (404, "nothing", "Start an MLflow server there"),
    ],
)
def test_mlflow_servers_that_refuse(
    status: int, body: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, body) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert part in only(mlflow.tracking(tmp_path), "failure").remedy


def test_a_port_is_no_status() -> None:
    refused = "HTTPConnectionPool(host='127.0.0.1', port=5401): Connection refused; port=4030"
    assert "dpo ui" in mlflow._remedy("http://127.0.0.1:5401", refused)


def test_servers_that_are_dead_or_silent_cost_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _IMPATIENT.items():
        monkeypatch.setenv(name, min(value, "1"))
    with silent() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        assert "read timed" in only(mlflow.tracking(tmp_path), "failure").says.lower()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            assert "does not answer" in only(prefect.server(), "failure").says
        assert time.monotonic() - began < 90
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        assert "refused" in only(prefect.server(), "failure").says


def test_prefect_servers_that_ask_for_a_password_or_are_none() -> None:
    for status, part in ((401, "PREFECT_API_AUTH_STRING"), (404, "ends in /api")):
        with answering(status) as uri, temporary_settings({PREFECT_API_URL: f"{uri}/api"}):
            assert part in only(prefect.server(), "failure").remedy


def test_a_port_that_somebody_else_took(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent() as port:
        monkeypatch.setattr(ports, "_USUAL", {port: ("mlflow", "dpo ui --port N")})
        finding = only(ports.usual(), "warning")
    assert f"{port} of mlflow is in use by process {os.getpid()}" in finding.says
    assert all_ok(ports.usual())


_EXPOSED = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Open(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
server = HTTPServer(("0.0.0.0", 0), Open)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_server_that_is_open_to_other_machines() -> None:
    exposed = python(_EXPOSED, "mlflow")
    try:
        assert exposed.stdout
        port = exposed.stdout.readline().strip()
        (says,) = [f.says for f in ports.open_to_all() if f.state == "failure" and f":{port} " in f.says]
        assert f"process {exposed.pid} " in says
        assert says.endswith(f"listens on 0.0.0.0:{port} without a password")
    finally:
        exposed.kill()
        exposed.wait()


def test_a_check_that_breaks_holds_up_no_other() -> None:
    def broken() -> Iterator[CheckResult]:
        yield ok("first", "fine")
        raise ValueError("what")

    def fine() -> Iterator[CheckResult]:
        yield ok("last", "fine")

    findings = run_checks([("quick", [broken, fine])])
    assert {(f.check, f.state) for f in findings} == {("first", "ok"), ("quick", "failure"), ("last", "ok")}


def test_the_command_tells_in_json_and_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stuck run breaks an otherwise sound workspace."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    gone = Owner(host=socket.gethostname(), pid=999999999, born=1)
    save_run(tmp_path, RunRecord(run_id="cut", recipe="tiny", started_at=NOW, owner=gone))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done = CliRunner().invoke(app, ["doctor", "--json", "--workspace", str(tmp_path)])
    assert isinstance(done.exception, StageFailed)
    assert str(done.exception).startswith("broken: ")
    report = json.loads(done.stdout)
    assert {f["check"] for f in report} >= {"packages", "workspace", "disk", "runs", "mlflow", "ports"}
    assert [f["says"] for f in report if f["check"] == "runs"] == [
        "cut is recorded as running, but its process is gone"
    ]
    assert [record.status for record in read_records(tmp_path)] == ["running"], "it changes nothing"
    assert not (tmp_path / "mlflow.db").exists()
