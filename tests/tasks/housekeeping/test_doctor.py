"""`dpo doctor`: detects each provoked fault and reports its remedy; a sound machine has no faults."""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from dpo_core.temporary import Owner, this_process
from tasks.housekeeping.doctor import machine, mlflow, ports, prefect, workspace
from tasks.housekeeping.doctor.check_result import CheckResult, ok, run_checks
from tasks.runs.record import RunRecord, read_records, save_run
from tests.support.runs.stored import REPO, make, python

NOW = datetime.now(UTC)


def only(findings: Iterable[CheckResult], state: str) -> CheckResult:
    """The one finding of this state."""
    (match,) = [finding for finding in findings if finding.state == state]
    return match


def all_ok(findings: Iterable[CheckResult]) -> bool:
    return {finding.state for finding in findings} <= {"ok"}


@contextmanager
def answering(status: int, body: str = "", date: str | None = None) -> Iterator[str]:
    """A server that gives this answer to everything; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            if date:
                self.send_header("Date", date)
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
    assert wrong.says.startswith("fastapi 0.165.0, needed <0.151,>=0.139: Prefect's server does not start")
    assert "pip install 'fastapi" in wrong.remedy
    assert "not-there-1 is missing" in missing.says


def test_this_environment_is_sound() -> None:
    assert all_ok(machine.python())
    assert [f for f in machine.packages() if f.state == "failure"] == []


def test_a_gpu_that_torch_was_not_built_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| Driver Version: 550.1   CUDA Version: 11.4 |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = machine.accelerator()
    built = machine._torch_cuda()
    assert finding.state == ("warning" if built is None else "failure")
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert "NVIDIA-SMI has failed" in only(machine.accelerator(), "failure").says


def test_no_compiler_and_a_proxy_before_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in only(machine.compiler(), "warning").remedy
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "NO_PROXY" in only(machine.network(), "warning").remedy
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert all_ok(machine.network())


def test_a_workspace_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert "writable" in only(workspace.folder(tmp_path), "failure").remedy
        return
    (tmp_path / "file").write_text("")
    assert only(workspace.folder(tmp_path / "file" / "runs"), "failure")
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return
    try:
        assert "writable" in only(workspace.folder(tmp_path), "failure").remedy
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_a_file_of_another_user(tmp_path: Path) -> None:
    assert all_ok(workspace.owner(tmp_path))
    (tmp_path / "store").mkdir()
    os.chown(tmp_path / "store", 65534, 65534)
    assert only(workspace.owner(tmp_path), "failure").remedy.startswith("sudo chown -R")


def test_a_store_on_a_disk_of_its_own(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    elsewhere = memory / f"dpo-{os.getpid()}"
    elsewhere.mkdir()
    try:
        (tmp_path / "work").symlink_to(elsewhere)
        assert "work of" in only(workspace.folder(tmp_path), "warning").says
    finally:
        elsewhere.rmdir()


_BEGUN = """
import sys, time
from datetime import UTC, datetime
from dpo_core.temporary import this_process
from tasks.runs.record import RunRecord, save_run
record = RunRecord(run_id='cut', recipe='tiny', started_at=datetime.now(UTC), owner=this_process(),
                   command='dpo run tiny')
save_run(sys.argv[1], record)
print('begun', flush=True)
time.sleep(60)
"""


def test_a_run_whose_process_was_killed_is_stuck_and_one_at_work_is_not(tmp_path: Path) -> None:
    run = python(_BEGUN, tmp_path)
    assert run.stdout
    assert run.stdout.readline() == "begun\n"
    assert all_ok(workspace.stuck_runs(tmp_path))
    run.kill()
    os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)  # ended, and not waited for: gone, too
    finding = only(workspace.stuck_runs(tmp_path), "failure")
    run.wait()
    assert finding == only(workspace.stuck_runs(tmp_path), "failure")
    assert finding.says == "cut is recorded as running, but its process is gone"
    assert "dpo run tiny --resume cut" in finding.remedy
    assert "dpo gc --drop-run cut" in finding.remedy


def test_a_run_of_an_older_version_is_stuck_when_nothing_was_written_for_days(tmp_path: Path) -> None:
    save_run(tmp_path, RunRecord(run_id="old", recipe="tiny", started_at=NOW))
    assert all_ok(workspace.stuck_runs(tmp_path))
    long_ago = time.time() - 3 * 86400
    os.utime(tmp_path / "runs" / "old" / "run.json", (long_ago, long_ago))
    assert "nothing was written for 3 days" in only(workspace.stuck_runs(tmp_path), "failure").says


def test_what_killed_processes_left(tmp_path: Path) -> None:
    from tasks.store.store import Store

    make(Store(tmp_path), {"a": b"1"})
    assert all_ok(workspace.leftovers(tmp_path))
    (tmp_path / "store" / "tmp" / f"{socket.gethostname()}+999999999+1+abc").mkdir()
    assert "dpo gc" in only(workspace.leftovers(tmp_path), "warning").remedy


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    soon = datetime.now(UTC) + timedelta(hours=2)
    save_run(tmp_path, RunRecord(run_id="later", recipe="t", started_at=soon, status="done"))
    assert re.search(
        "started 1(19|20) minutes in the future", only(workspace.clock(tmp_path), "warning").says
    )


def _database(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values (?)", [revision])
        database.commit()


def test_tracking_databases_of_other_versions_and_damaged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "mlflow.db"
    known = mlflow._revisions()
    newest = set(known) - set(known.values())
    assert len(newest) == 1, "one line of revisions"
    _database(path, newest.pop())
    assert all_ok(mlflow.tracking(tmp_path))
    for revision, part in (("ffffffffffff", "newer MLflow"), ("451aebb31d03", "older MLflow")):
        path.unlink()
        _database(path, revision)
        assert part in only(mlflow.tracking(tmp_path), "failure").says
    path.write_bytes(b"no database at all, and longer than a header" * 100)
    assert "not a database" in only(mlflow.tracking(tmp_path), "failure").says


def test_a_tracking_database_that_this_user_may_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_core.errors import RecipeError
    from tasks.preflight import _check_database

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    known = mlflow._revisions()
    with tempfile.TemporaryDirectory(prefix="100% of #") as made:
        place = Path(made)
        place.chmod(0o755)
        path = place / "mlflow.db"
        _database(path, (set(known) - set(known.values())).pop())
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
        path.chmod(0o644)
        assert all_ok(mlflow.tracking(place))


def test_a_home_of_prefect_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_HOME

    from dpo_core.errors import RecipeError
    from flows.process.temporary_server import start_temporary_server

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
        (404, "nothing", "address of an MLflow server"),
    ],
)
def test_mlflow_servers_that_refuse(
    status: int, body: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, body) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert part in only(mlflow.tracking(tmp_path), "failure").remedy


def test_servers_that_are_dead_or_silent_cost_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        assert "does not answer" in only(mlflow.tracking(tmp_path), "failure").says
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            assert "does not answer" in only(prefect.server(), "failure").says
        assert time.monotonic() - began < 90
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        assert "refused" in only(prefect.server(), "failure").says


def test_prefect_servers_that_ask_for_a_password_or_are_none() -> None:
    for status, part in ((401, "PREFECT_API_AUTH_STRING"), (404, "ends in /api")):
        with answering(status) as uri, temporary_settings({PREFECT_API_URL: f"{uri}/api"}):
            assert part in only(prefect.server(), "failure").remedy


def test_a_server_whose_clock_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, "{}", date="Thu, 01 Jan 2026 00:00:00 GMT") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert "s behind this machine's" in [f.says for f in mlflow.tracking(tmp_path)][-1]


def test_a_port_that_somebody_else_took() -> None:
    with silent() as port:
        finding = only(ports.usual({port: ("MLflow", "/version")}), "warning")
    assert f"{port} of MLflow is in use by process {os.getpid()}" in finding.says
    assert all_ok(ports.usual({port: ("MLflow", "/version")}))


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
        exposures = [f for f in ports.open_to_all() if f.state == "failure" and f":{port} " in f.says]
        assert [f.says for f in exposures] == [
            f"MLflow (process {exposed.pid}) listens on 0.0.0.0:{port} without a password"
        ]
    finally:
        exposed.kill()
        exposed.wait()


def test_a_check_that_breaks_or_hangs_holds_up_no_other() -> None:
    def broken() -> Iterator[CheckResult]:
        yield ok("first", "fine")
        raise ValueError("what")

    def hangs() -> Iterator[CheckResult]:
        time.sleep(30)
        yield ok("never", "")

    def fine() -> Iterator[CheckResult]:
        yield ok("last", "fine")

    began = time.monotonic()
    findings = run_checks([("slow", [hangs]), ("quick", [broken, fine])], patience=0.5)
    assert time.monotonic() - began < 25
    assert {(f.check, f.state) for f in findings} == {
        ("slow", "failure"), ("first", "ok"), ("quick", "failure"), ("last", "ok"),
    }  # fmt: skip


def test_the_command_tells_in_json_and_by_its_exit_code(tmp_path: Path) -> None:
    """One real call: a stuck run breaks an otherwise sound workspace."""
    host = socket.gethostname()
    gone = RunRecord(
        run_id="cut", recipe="tiny", started_at=NOW, owner=Owner(host=host, pid=999999999, born=1)
    )
    save_run(tmp_path, gone)
    assert (this_process().host, this_process().pid) == (host, os.getpid())
    environment = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "doctor", "--json", "--workspace", str(tmp_path)],
        cwd=REPO, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    report = json.loads(done.stdout)
    assert {f["check"] for f in report} >= {
        "python",
        "packages",
        "workspace",
        "disk",
        "runs",
        "mlflow",
        "ports",
    }
    assert [f["says"] for f in report if f["check"] == "runs"] == [
        "cut is recorded as running, but its process is gone"
    ]
    assert "error: broken: " in done.stderr
    assert [record.status for record in read_records(tmp_path)] == ["running"], "it changes nothing"
    assert not (tmp_path / "mlflow.db").exists()
    shutil.rmtree(tmp_path)
