"""The services of compose.yaml on this machine without containers: the same commands, settings and order."""

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml

from tests.support.runs.tracked import free_port

REPO = Path(__file__).resolve().parents[3]
FOLDER = REPO / "deploy" / "docker"
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
PASSWORDS = {
    name: f"canary-{name.lower()}"
    for name in re.findall(
        r"^([A-Z_]*(?:PASSWORD|SECRET_KEY))=", (FOLDER / ".env.example").read_text(), re.MULTILINE
    )
}


class ComposeSite:
    """Its services, each reached on loopback in place of its name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        self.ports = {
            name: free_port() for name in ("postgres", "object-store", "mlflow", "prefect", "worker")
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.cluster = Path(tempfile.mkdtemp(prefix="dpo-postgres-"))  # a user of its own has to get there
        self.services = yaml.safe_load(self._here((FOLDER / "compose.yaml").read_text()))["services"]

    def _here(self, text: str) -> str:
        """The file as it is on this machine: variables filled in, addresses on loopback."""
        given = {"DPO_IMAGE": "dpo:test", **PASSWORDS}
        text = re.sub(r"\$\{([A-Z_]+)[^}]*\}", lambda found: given.get(found[1], ""), text)
        at = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        for old, new in {
            "http://prefect:4200": f"http://{at['prefect']}",
            "http://127.0.0.1:4200": f"http://{at['prefect']}",
            "http://object-store:9000": f"http://{at['object-store']}",
            "http://mlflow:5000": f"http://{at['mlflow']}",
            "http://127.0.0.1:5000": f"http://{at['mlflow']}",
            "http://127.0.0.1:8080": f"http://{at['worker']}",
            "mlflow:5000,localhost:5000,127.0.0.1:5000": f"mlflow:5000,{at['mlflow']}",
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={self.ports['mlflow']}",
            "--port=4200": f"--port={self.ports['prefect']}",
            "PGHOST: postgres": f"PGHOST: 127.0.0.1\n      PGPORT: '{self.ports['postgres']}'",
            "DATABASE_HOST: postgres": "DATABASE_HOST: 127.0.0.1",
            'DATABASE_PORT: "5432"': f'DATABASE_PORT: "{self.ports["postgres"]}"',
            "/etc/mlflow/auth.ini\n": f"{FOLDER}/mlflow-auth.ini\n",
            '"/opt/dpo/deployments.sh"': f'"{FOLDER}/deployments.sh"',
        }.items():
            assert old in text, old
            text = text.replace(old, new)
        return text

    def environment(self, name: str) -> dict[str, str]:
        own = {key: str(value or "") for key, value in self.services[name].get("environment", {}).items()}
        path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": path,
            # What the image sets.
            "DPO_HOME": str(self.home),
            "PREFECT_HOME": str(self.folder / f"prefect-{name}"),
            "HOME": str(self.folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PREFECT_WORKER_WEBSERVER_PORT": str(self.ports["worker"]),
            **own,
        }

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _open(self, name: str, command: list[str], env: dict[str, str], **how: Any) -> None:
        with self.log(name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                command, env=env, cwd=self.home, stdout=log, stderr=log, start_new_session=True, **how
            )

    def start_postgres(self) -> None:
        """As the image does: the superuser's password, then what lies in docker-entrypoint-initdb.d."""
        assert POSTGRES is not None
        how: dict[str, Any] = {}
        if os.getuid() == 0:
            owner = pwd.getpwnam("postgres")
            how = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            os.chown(self.cluster, owner.pw_uid, owner.pw_gid)
        secret = self.cluster / "superuser"
        secret.write_text(PASSWORDS["POSTGRES_PASSWORD"])
        secret.chmod(0o644)
        data = self.cluster / "data"
        subprocess.run(
            [POSTGRES / "initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile", secret],
            check=True, capture_output=True, cwd=self.cluster, **how,
        )  # fmt: skip
        port = str(self.ports["postgres"])
        options = ["-D", str(data), "-p", port, "-k", str(self.cluster), "-h", "127.0.0.1"]
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        with self.log("postgres").open("wb") as log:
            self.running["postgres"] = subprocess.Popen(
                [str(POSTGRES / "postgres"), *options],
                env=env, cwd=self.cluster, stdout=log, stderr=log, start_new_session=True, **how,
            )  # fmt: skip
        ready = [POSTGRES / "pg_isready", *self.services["postgres"]["healthcheck"]["test"][2:]]
        ready += ["--port", port]
        until(lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, 60)
        env |= {"PGHOST": str(self.cluster), "PGPORT": port}
        env |= {"PGPASSWORD": PASSWORDS["POSTGRES_PASSWORD"], "POSTGRES_USER": "postgres"}
        env |= self.services["postgres"]["environment"]
        done = subprocess.run(
            ["sh", FOLDER / "databases.sh"], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def start_object_store(self) -> None:
        """Moto speaks S3 in place of MinIO; it asks for no password."""
        command = [
            sys.executable,
            "-m",
            "moto.server",
            "-H",
            "127.0.0.1",
            "-p",
            str(self.ports["object-store"]),
        ]
        self._open("object-store", command, self.environment("bucket"))
        until(lambda: self.asked("object-store", "/moto-api/") == 200, 120)

    def start(self, name: str) -> None:
        """The service, until its own health check is content; one that ends by itself, until then."""
        service = self.services[name]
        command = [sys.executable if part == "python" else part for part in service["command"]]
        self._open(name, command, self.environment(name))
        if "healthcheck" not in service:
            assert self.running.pop(name).wait(300) == 0, self.log(name).read_text()
            return
        check = [sys.executable, *service["healthcheck"]["test"][2:]]
        env = self.environment(name)

        def healthy() -> bool:
            assert self.running[name].poll() is None, self.log(name).read_text()
            return subprocess.run(check, env=env, capture_output=True, check=False).returncode == 0

        until(healthy, 240)

    def asked(self, name: str, path: str, login: str = "", body: Any = None, **headers: str) -> Any:
        """What a service answers: the status, or the parsed JSON where there is a login."""
        if login:
            headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
        data = None if body is None else json.dumps(body).encode()
        headers |= {"Content-Type": "application/json"}
        try:
            with urlopen(
                Request(f"http://127.0.0.1:{self.ports[name]}{path}", data, headers), timeout=30
            ) as answer:
                return json.loads(answer.read()) if login else answer.status
        except HTTPError as error:
            return error.code
        except OSError:
            return None

    def run(self, service: str, command: str) -> subprocess.CompletedProcess[str]:
        """A command in the environment of a service."""
        return subprocess.run(
            shlex.split(command),
            env=self.environment(service),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def stop(self) -> None:
        for name, process in reversed(self.running.items()):
            # SIGINT is what Postgres calls a fast shutdown; with SIGTERM it waits for its clients.
            os.killpg(process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        shutil.rmtree(self.cluster, ignore_errors=True)


def until(found: Callable[[], Any], patience: float) -> Any:
    deadline = time.monotonic() + patience
    while not (got := found()):
        assert time.monotonic() < deadline, f"waited {patience} s"
        time.sleep(0.5)
    return got
