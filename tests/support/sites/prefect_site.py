"""A real Prefect server with a worker of its process pool, and a folder to work in."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import yaml

from tests.scenarios.bad_inputs import World, good_rows, lines
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tracked import free_port

REPO = Path(__file__).resolve().parents[3]


class Site:
    """A Prefect server with a worker of its pool, a folder to work in, and a receiver of webhooks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.elsewhere = folder / "elsewhere"
        for made in (self.home, self.elsewhere):
            made.mkdir()
        self.world = World(self.home, make_tiny_model(folder / "model"))
        (self.home / "good.jsonl").write_text(lines(good_rows()))
        self.recipe = self.home / "tiny.yaml"
        self.recipe.write_text(yaml.safe_dump(self.world.recipe_of(workspace="./runs")))
        self.api = f"http://127.0.0.1:{free_port()}/api"
        self.told: list[dict[str, Any]] = []
        self.running: list[subprocess.Popen[bytes]] = []
        self.python = sys.executable

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.api,
            # A worker's runs are to find the package whatever folder they start in.
            "PYTHONPATH": str(REPO),
            "DPO_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": "",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "15",
        }

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{arguments[1]}-{arguments[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                [self.python, "-m", "prefect", *arguments],
                cwd=self.elsewhere,
                env=self.environment() | more,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def dpo(self, *arguments: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.main", *arguments],
            cwd=self.elsewhere,
            env=self.environment() | more,
            capture_output=True,
            text=True,
            timeout=900,  # a server on SQLite that is busy answers 503, and the client waits and asks again
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = Request(self.api + path, data, {"Content-Type": "application/json"}, method=method)
        with urlopen(asked, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def open(self, **more: str) -> None:
        """Start the server and, once it answers, the worker, with more variables for it and its runs."""
        self.serve()
        self.ask("/work_pools/", {"name": "dpo", "type": "process"})
        self.worker(**more)

    def serve(self, **more: str) -> None:
        """Start the server, or start it again, and wait until it answers."""
        port = self.api.split(":")[2].split("/")[0]
        server = self.start("server", "start", "--host", "127.0.0.1", "--port", port, **more)
        self.running.insert(0, self.running.pop())  # first, whatever runs already: it is the last to end
        until(lambda: server.poll() is None and _answers(self), 240)

    def worker(self, **more: str) -> subprocess.Popen[bytes]:
        """Start a worker."""
        return self.start("worker", "start", "--pool", "dpo", "--name", "one", **more)

    def close(self) -> None:
        """End them and whatever they have started."""
        alive = [one for one in self.running if one.poll() is None]
        family = [child for one in alive for child in psutil.Process(one.pid).children(recursive=True)]
        for one in reversed(alive):
            one.send_signal(signal.SIGTERM)
        for one in alive:
            try:
                one.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(one.pid, signal.SIGKILL)
                one.wait(10)
        _, left = psutil.wait_procs(family, timeout=15)
        for process in left:
            process.kill()

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        query = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return self.ask("/flow_runs/filter", query)

    def ended(self, deployment: str, number: int = 1, patience: float = 240) -> dict[str, Any]:
        """The deployment's run of that number (1: the first), once it has ended."""

        def found() -> Any:
            finished = [
                run
                for run in self.runs(deployment)
                if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")
            ]
            return finished[number - 1] if len(finished) >= number else None

        return until(found, patience)


def until(found: Callable[[], Any], patience: float, pause: float = 0.5) -> Any:
    deadline = time.monotonic() + patience
    while not (got := found()):
        assert time.monotonic() < deadline, f"waited {patience} s"
        time.sleep(pause)
    return got


def _answers(site: Site) -> bool:
    try:
        return bool(site.ask("/health"))
    except OSError:
        return False
