"""`dpo ui` as a user starts it, looked at in a real browser, and ended as a user ends it.

The run is recorded by the real tracker; its numbers are synthetic (see tests/support/reports/reports.py).
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.recipe.sections import TrackingConfig
from tasks.reports.verdict import verdict
from tasks.runs.record import RunRecord, save_run
from tasks.stages.summary import publish
from tasks.store.files import run_folder
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import Tracker
from tests.support.reports.run_reports import example
from tests.support.runs.tracked import free_port
from tests.support.sites.browser import chromium

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[3]
REPORT = example(steps=30)
# What MLflow's own pages write to the console whatever they show.
MLFLOWS_OWN = ("/users/current", "ResizeObserver loop", "AG Grid")
PATIENCE = 600.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which one run was tracked: two stages with curves, the report, its page."""
    workspace = tmp_path_factory.mktemp("ui") / "runs"
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/mlflow.db"), workspace)
    name = REPORT.run.name
    run_id = tracker.start_parent(name, recipe={"name": "tiny", "dpo": {"parameters": {"beta": 0.25}}})
    tracker.parent.dataset("pairs", "d" * 64, 4812, "/data/pairs", "training")
    for stage, curve in REPORT.curves.items():
        log = workspace / f"{stage}.jsonl"
        log.write_text("".join(json.dumps({"time": time.time(), **row}) + "\n" for row in curve))
        with tracker.child(stage) as child:
            child.metrics_from_jsonl(log)
    assert REPORT.model
    version = register_model(tracker, REPORT.model.name, str(workspace / "model"))
    registered = REPORT.model.model_copy(update={"version": version})
    publish(REPORT.model_copy(update={"model": registered}), run_folder(workspace, name), tracker)
    tracker.finish_parent()
    started = REPORT.run.started_at
    save_run(workspace, RunRecord(run_id=name, recipe="tiny", started_at=started, mlflow_run_id=run_id))
    return workspace


@contextmanager
def ui(workspace: Path) -> Iterator[tuple["subprocess.Popen[str]", dict[str, str], int]]:
    """`dpo ui`, what it printed (name of a line to the rest of it), and its port."""
    port = free_port()
    arguments = ["ui", "--workspace", str(workspace), "--no-browser", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", *arguments],
        cwd=REPO,
        env=os.environ | {"MLFLOW_TRACKING_URI": ""},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said: dict[str, str] = {}
    try:
        assert process.stdout
        while "page" not in said:
            line = process.stdout.readline()
            assert line, f"dpo ui ended with {process.wait()} after saying {said}"
            key, _, rest = line.strip().partition(" ")
            said[key] = rest.strip()
        yield process, said, port
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE)


@pytest.fixture(scope="module")
def address(workspace: Path) -> Iterator[dict[str, str]]:
    with ui(workspace) as (_, said, _):
        yield said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def shows(driver: Any, *words: str) -> str:
    """Wait until the page shows all these words; returns its text."""
    deadline = time.monotonic() + PATIENCE
    while True:
        text = str(driver.execute_script("return document.body ? document.body.innerText : ''"))
        missing = [word for word in words if word not in text]
        if not missing:
            return text
        assert time.monotonic() < deadline, f"{missing} not in {text!r}"
        time.sleep(0.3)


def console(driver: Any) -> list[str]:
    """Errors that the browser reported since the last call, MLflow's own noise left out."""
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in severe if not any(own in message for own in MLFLOWS_OWN)]


def child_id(workspace: Path, stage: str) -> str:
    from mlflow import MlflowClient

    api = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    (run,) = api.search_runs(
        [api.get_experiment_by_name("dpo/tiny").experiment_id], f"tags.`dpo.stage` = '{stage}'"
    )
    return str(run.info.run_id)


def test_the_run_says_how_it_went(browser: Any, address: dict[str, str]) -> None:
    browser.get(address["newest"])
    shows(browser, REPORT.run.name, verdict(REPORT).headline, "gain/dpo", "dpo.parameters.beta")
    # Child runs, the data set, a tag, the registered model.
    text = shows(browser, *REPORT.curves, "pairs (dddd", "dpo.verdict", "imdb-dpo")
    assert "Evaluations" not in text, "MLflow takes it for a run of prompts and traces"
    rows = browser.execute_script(
        "return [...document.querySelectorAll('[role=row]')].map(row => row.innerText.split('\\n'))"
    )
    assert ["gain/dpo", "0.523"] in [row[:2] for row in rows]
    assert console(browser) == []


def test_the_table_of_runs_shows_verdict_and_gain(browser: Any, address: dict[str, str]) -> None:
    browser.get(address["runs"])
    shows(browser, REPORT.run.name, "dpo.verdict", verdict(REPORT).headline[:20], "gain", "0.523")
    assert console(browser) == []


def test_the_curves_of_a_stage_are_drawn(browser: Any, address: dict[str, str], workspace: Path) -> None:
    url = re.sub(r"/runs/\w+", f"/runs/{child_id(workspace, 'train_dpo')}/model-metrics", address["newest"])
    browser.get(url)
    shows(browser, "train_dpo", "margins", "accuracies")
    deadline = time.monotonic() + PATIENCE
    lines: list[int] = []
    # Eleven metrics, those of the held-out pairs at every third of the 30 steps.
    while len(lines) < 11 or min(lines) < 10:
        assert time.monotonic() < deadline, f"points of the drawn curves: {lines}"
        time.sleep(0.3)
        lines = browser.execute_script(
            "return [...document.querySelectorAll('.js-line')]"
            ".map(line => (line.getAttribute('d') || '').split(/[ML]/).length - 1)"
        )
    text = shows(browser, "train_dpo (rewards/margins)", "train_dpo (logps/chosen)")
    assert not re.search(r"^time$", text, re.M), "the time of a line is no metric"
    assert console(browser) == []


def test_the_run_page_is_an_artifact_that_opens(browser: Any, address: dict[str, str]) -> None:
    browser.get(address["newest"].replace("?", "/artifacts/page.html?"))
    shows(browser, "page.html", "report.json", "summary.md")
    deadline = time.monotonic() + PATIENCE
    while not browser.find_elements("css selector", "iframe"):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    browser.switch_to.frame(browser.find_element("css selector", "iframe"))
    try:
        text = shows(browser, verdict(REPORT).headline, "Policies", "+0.523", "Reproduce")
        assert REPORT.run.name in text
        charts = browser.execute_script("return document.querySelectorAll('svg.chart').length")
        assert charts == 18
    finally:
        browser.switch_to.default_content()
    assert console(browser) == []
    assert Path(address["page"].removeprefix("file://")).is_file()


def test_the_registered_model_says_what_it_is(browser: Any, address: dict[str, str]) -> None:
    base, _, query = address["mlflow"].partition("#/experiments")
    browser.get(f"{base}#/models/imdb-dpo/versions/1{query}")
    shows(browser, "challenger", REPORT.run.name, verdict(REPORT).headline, "dpo.weights_uri")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ending_it_leaves_no_process(workspace: Path, ending: signal.Signals) -> None:
    with ui(workspace) as (process, _, port):
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        process.send_signal(ending)  # to the command alone, not to its process group
        assert process.wait(30) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
