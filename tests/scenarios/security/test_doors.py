"""Who may speak to the servers: MLflow and Prefect with a password, from `dpo` as a person starts it."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from dpo_core.errors import RecipeError
from flows.commands.ui_access import access, is_loopback
from tests.scenarios.bad_inputs import World, good_rows, lines
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tracked import RECIPE, free_port

REPO = Path(__file__).resolve().parents[3]
USER, PASSWORD = "operator", "canary-9d41-password"
ASK = "/api/2.0/mlflow/experiments/search?max_results=1"


def test_only_loopback_is_open_without_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert is_loopback(host)
        assert access(host, tmp_path).options == []
    for host in ("0.0.0.0", "::", "192.168.1.4", "gpu-box", "localhost.example.org", ""):
        with pytest.raises(RecipeError, match="without a password"):
            access(host, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "short")
    with pytest.raises(RecipeError, match="12 characters or more"):
        access("0.0.0.0", tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- real servers -----------------------------------------------------------------------------------------


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    return kept | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TMPDIR": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@contextmanager
def server(folder: Path, name: str, *command: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=REPO,
            env=environment(folder, **variables),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=15)
        for child in alive:
            child.kill()


def status(address: str, user: str = "", password: str = "", **headers: str) -> int:
    """The answer's number; 0 where nobody answers."""
    if user:
        headers["Authorization"] = f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait_for(address: str, numbers: set[int]) -> None:
    deadline = time.monotonic() + 600
    while status(address) not in numbers:
        assert time.monotonic() < deadline, f"{address} does not answer"
        time.sleep(0.5)


def command_lines(process: "subprocess.Popen[bytes]") -> str:
    whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return " ".join(part for one in whole for part in one.cmdline())


def dpo(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.main", *arguments],
        cwd=REPO,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("doors")
    (folder / "good.jsonl").write_text(lines(good_rows()))
    return World(folder, make_tiny_model(folder / "model"))


def test_a_workspace_whose_path_has_a_percent_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "long enough 12")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    place = tmp_path / "50%(x)s%"
    place.mkdir()
    config = ConfigParser()  # as MLflow reads it
    config.read(access("0.0.0.0", place).environment["MLFLOW_AUTH_CONFIG_PATH"])
    assert config.get("mlflow", "database_uri") == f"sqlite:///{place}/mlflow-users.db"
    (tmp_path / "a\n[b]").mkdir()
    with pytest.raises(RecipeError, match="line break"):
        access("0.0.0.0", tmp_path / "a\n[b]")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ui_on_a_network_asks_for_a_password(tmp_path: Path, world: World) -> None:
    pytest.importorskip("flask_wtf")
    from tasks.recipe.sections import TrackingConfig
    from tasks.tracking.tracker import Tracker

    workspace = tmp_path / "runs"
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/mlflow.db"), workspace)
    tracker.start_parent("run", recipe=RECIPE)
    tracker.finish_parent()
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    asked = ("flows.cli.main", "ui", "--workspace", str(workspace), "--no-browser", "--port", str(port))
    login = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}

    with server(tmp_path, "loopback", *asked):
        wait_for(address + "/health", {200})
        assert status(address + ASK) == 200
        assert status(address + ASK, Host="evil.example") == 403, "a foreign name that leads here (DNS)"

    with server(tmp_path, "network", *asked, "--host", "0.0.0.0", **login) as process:
        wait_for(address + ASK, {401})
        assert [status(address + path) for path in ("/", ASK, "/get-artifact?path=x&run_uuid=y")] == [401] * 3
        assert status(address + ASK, USER, "wrong-password") == 401
        assert status(address + ASK, USER, PASSWORD) == 200
        assert status(address + ASK, USER, PASSWORD, Host="evil.example") == 403
        assert PASSWORD not in command_lines(process)
        assert (workspace / "mlflow-users.db").stat().st_mode & 0o077 == 0

        where = {"MLFLOW_TRACKING_URI": address}
        recipe = world.file("recipe.yaml", yaml.safe_dump(world.recipe_of()))
        asked_run = ("run", recipe, "--set", f"workspace={tmp_path / 'far'}")
        for wrong in ({}, login | {"MLFLOW_TRACKING_PASSWORD": "canary-wrong-password"}):
            began = time.monotonic()
            refused = dpo(tmp_path, *asked_run, **where, **wrong)
            assert refused.returncode == 2, refused.stderr
            assert "requires a valid user name and password" in refused.stderr
            assert "MLFLOW_TRACKING_PASSWORD" in refused.stderr
            assert "Traceback" not in refused.stderr
            assert time.monotonic() - began < 90
            assert not list((tmp_path / "far").rglob("index/*/*.json")), "no stage ran"
        done = dpo(tmp_path, *asked_run, **where, **login)
        assert done.returncode == 0, done.stderr
        assert "MLflow at" not in done.stderr, "nothing was refused or waited"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_prefect_server_with_a_password(tmp_path: Path, world: World) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}/api"
    right, wrong = f"{USER}:{PASSWORD}", f"{USER}:canary-wrong-password"
    start = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    where = {"PREFECT_API_URL": address, "DPO_HOME": str(world.folder), "MLFLOW_TRACKING_URI": ""}
    recipe = world.file("recipe.yaml", yaml.safe_dump(world.recipe_of(workspace=str(tmp_path / "runs"))))
    with server(tmp_path, "prefect", *start, PREFECT_SERVER_API_AUTH_STRING=right) as process:
        wait_for(address + "/flows/count", {401, 405})
        assert PASSWORD not in command_lines(process)
        for login, asked in (
            ({}, ("deploy", "--dry-run")),
            ({}, ("run", recipe)),
            ({"PREFECT_API_AUTH_STRING": wrong}, ("event", "new-data", str(world.folder / "good.jsonl"))),
            ({"PREFECT_API_AUTH_STRING": wrong}, ("run", recipe)),
        ):
            refused = dpo(tmp_path, *asked, **where, **login)
            assert refused.returncode == 2, f"{asked}: {refused.stderr}"
            assert "requires a valid user name and password" in refused.stderr, asked
            assert "PREFECT_API_AUTH_STRING" in refused.stderr
            assert "Traceback" not in refused.stderr
            assert "canary" not in refused.stderr
        login = {"PREFECT_API_AUTH_STRING": right}
        made = subprocess.run(
            [sys.executable, "-m", "prefect", "work-pool", "create", "dpo", "--type", "process"],
            env=environment(tmp_path, **where, **login),
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        for asked in (("deploy",), ("run", recipe)):
            done = dpo(tmp_path, *asked, **where, **login)
            assert done.returncode == 0, f"{asked}: {done.stderr}"
            assert PASSWORD not in done.stdout + done.stderr
