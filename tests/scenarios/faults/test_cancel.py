"""Stopped runs: nothing lives on, the checkpoint is whole, the records say so, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.runs.record import list_runs
from tests.scenarios.bad_inputs import World
from tests.scenarios.faults import runs
from tests.scenarios.faults.runs import Family
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tiny_run import Bench
from tests.support.sites.prefect_site import REPO, Site, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Process = subprocess.Popen[bytes]
Tell = Callable[..., None]
ENDED = {"KILLED", "FAILED"}
GRID = {"DPO": {"parameters.beta": [0.1, 0.5]}}


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Iterator[Tell]:
    """Collects the rows of the table that is shown at the end."""
    rows = ["way | s until nothing lives | checkpoint | MLflow | record | exit | resume"]
    yield lambda *cells: rows.append(" | ".join(str(cell) for cell in cells))
    reporter: Any = request.config.pluginmanager.getplugin("terminalreporter")
    for row in rows:
        reporter.write_line(row)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def undisturbed(bench: Bench, site: Site, *arguments: str) -> dict[str, Any]:
    """A run to its end. Its Prefect server is one that is there: a run's own costs more than the rest."""
    command = ["run", str(bench.recipe), "--json", *arguments]
    return json.loads(site.dpo(*command))


def make_bench(folder: Path, model: Path, site: Site, **changes: Any) -> Bench:
    """A workspace after an undisturbed run."""
    folder.mkdir()
    bench = Bench(folder)
    bench.recipe.write_text(yaml.safe_dump(runs.long_recipe(World(folder, model), **changes)))
    undisturbed(bench, site)
    return bench


@pytest.fixture(scope="module")
def whole(model: Path, shop: "Shop", tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("cancel") / "whole", model, shop.site)


@pytest.fixture(scope="module")
def studied(model: Path, shop: "Shop", tmp_path_factory: pytest.TempPathFactory) -> Bench:
    study = {"seeds": [0], "grid": GRID, "best_of": [2], "parallel": 2}
    return make_bench(tmp_path_factory.mktemp("study") / "whole", model, shop.site, study=study)


@pytest.fixture
def family() -> Iterator[Family]:
    family = Family()
    yield family
    family.end()


def once(number: signal.Signals) -> Callable[[Process], None]:
    return lambda process: process.send_signal(number)


def to_all(number: signal.Signals) -> Callable[[Process], None]:
    return lambda process: runs.signal_all(process, number)


def twice(way: Callable[[Process], None]) -> Callable[[Process], None]:
    def send(process: Process) -> None:
        way(process)
        time.sleep(0.3)
        if process.poll() is None:
            way(process)

    return send


WAYS: dict[str, tuple[Callable[[Process], None], int]] = {
    "SIGINT": (once(signal.SIGINT), 130),
    "SIGINT twice": (twice(once(signal.SIGINT)), 130),
    "Ctrl-C": (to_all(signal.SIGINT), 130),
    "Ctrl-C twice": (twice(to_all(signal.SIGINT)), 130),
    "SIGTERM": (once(signal.SIGTERM), 143),
    "SIGTERM to the group": (to_all(signal.SIGTERM), 143),
    "SIGHUP to the group": (to_all(signal.SIGHUP), 129),
    "kill -9": (once(signal.SIGKILL), -9),
}


def train_and_stop(bench: Bench, family: Family, way: str, trainings: int = 1) -> tuple[float, int]:
    """Stop a run when each of its trainings has a checkpoint; seconds until nothing lives, and its status."""
    flow = runs.start(bench, family)
    log = bench.folder / "stopped.log"
    training = lambda: len(runs.checkpoints(bench.workspace)) == trainings  # noqa: E731
    runs.wait_for(training, log, lambda: flow.poll() is None)
    return stop(flow, family, way, log)


def stop(flow: Process, family: Family, way: str, log: Path) -> tuple[float, int]:
    begun = time.monotonic()
    WAYS[way][0](flow)
    code = flow.wait(timeout=runs.PATIENCE)
    family.gone_after()
    seconds = time.monotonic() - begun
    assert seconds < runs.PATIENCE
    if way != "kill -9":
        assert "to resume: dpo run" in log.read_text(), "it came to its end, before the time limit ended it"
    return seconds, code


def assert_recorded(workspace: Path, stopped: str, *, killed: bool = False) -> tuple[str, str]:
    """MLflow and the run's record say that it was stopped, as does the child of the stage at work.

    A killed run cannot write that down: the record's readers know all the same, and the resumed run, which is
    looked at later, finds it to do.
    """
    record = runs.newest_record(workspace)
    (seen, *_) = list_runs(workspace)
    assert (seen.run_id, seen.status) == (record["run_id"], "stopped"), seen
    statuses = runs.tracked(workspace, record)
    if killed and record["status"] == "running":
        return "left to the next run", f"{seen.status}: {seen.error}"
    assert statuses["run"] in ENDED, statuses
    interrupted = {status for name, status in statuses.items() if name.startswith(stopped)}
    assert interrupted, statuses
    assert interrupted <= ENDED, statuses
    assert "RUNNING" not in statuses.values()
    assert record["status"] == "stopped", record
    return statuses["run"], f"{record['status']}: {record['error']}"


def assert_goes_on(bench: Bench, reference: Bench, site: Site) -> None:
    """The resumed run ends with every artifact of an undisturbed one, bit for bit."""
    stopped = runs.newest_record(bench.workspace)
    report = undisturbed(bench, site, "--resume")
    assert report["run"]["name"] == stopped["run_id"]
    assert bench.index() == reference.index()
    record = runs.newest_record(bench.workspace)
    assert (record["run_id"], record["status"], record["error"]) == (stopped["run_id"], "done", None)
    statuses = runs.tracked(bench.workspace, record)
    assert set(statuses.values()) == {"FINISHED"}, statuses


@pytest.mark.parametrize("way", WAYS)
def test_stopped_in_training(whole: Bench, shop: "Shop", family: Family, tell: Tell, way: str) -> None:
    own = whole.copy(way.replace(" ", "-"))
    runs.forget(own, "train-dpo DPO", "evaluate")
    seconds, code = train_and_stop(own, family, way)
    (step,) = runs.assert_whole(own.workspace)
    status, record = assert_recorded(own.workspace, "train-dpo DPO", killed=way == "kill -9")
    assert code == WAYS[way][1]
    assert_goes_on(own, whole, shop.site)
    tell(way, f"{seconds:.1f}", f"whole, step {step}", status, record, code, "bit for bit")


@pytest.mark.parametrize("way", ["SIGINT", "SIGTERM"])
def test_stopped_in_a_stage_without_a_process_of_its_own(
    whole: Bench, shop: "Shop", family: Family, tell: Tell, way: str
) -> None:
    own = whole.copy(f"evaluate-{way}")
    runs.forget(own, "evaluate")
    flow = runs.start(own, family)
    log = own.folder / "stopped.log"
    runs.wait_for(lambda: "evaluate: running" in log.read_text(), log, lambda: flow.poll() is None)
    time.sleep(0.5)
    assert flow.poll() is None
    seconds, code = stop(flow, family, way, log)
    status, record = assert_recorded(own.workspace, "evaluate")
    assert code == WAYS[way][1]
    assert_goes_on(own, whole, shop.site)
    tell(f"{way} in evaluate", f"{seconds:.1f}", "-", status, record, code, "bit for bit")


@pytest.mark.parametrize("way", ["Ctrl-C", "SIGTERM", "kill -9"])
def test_stopped_in_two_stages_side_by_side(
    studied: Bench, shop: "Shop", family: Family, tell: Tell, way: str
) -> None:
    own = studied.copy(f"study-{way.replace(' ', '-')}")
    runs.forget(own, "train-dpo DPO", "measure")
    seconds, code = train_and_stop(own, family, way, trainings=2)
    steps = runs.assert_whole(own.workspace, 2)
    status, record = assert_recorded(own.workspace, "train-dpo DPO", killed=way == "kill -9")
    assert code == WAYS[way][1]
    assert_goes_on(own, studied, shop.site)
    tell(
        f"{way}, two trainings",
        f"{seconds:.1f}",
        f"whole, steps {steps}",
        status,
        record,
        code,
        "bit for bit",
    )


# Under a server and its worker ------------------------------------------------------------------------------


class Shop:
    """A server with a worker and a deployment, and a workspace to run in."""

    def __init__(self, folder: Path) -> None:
        self.site, self.family = Site(folder), Family()
        self.site.open(**{runs.MARK: self.family.mark})
        flow = self.site.ask("/flows/", {"name": "dpo"})
        home = {"working_dir": str(self.site.home), "env": {"PYTHONPATH": str(REPO)}}
        body = {"name": "stopped", "flow_id": flow["id"], "entrypoint": "flows.deployed.deployed"}
        body |= {"work_pool_name": "dpo", "job_variables": home, "path": str(self.site.home)}
        self.deployment = self.site.ask("/deployments/", body)["id"]

    @property
    def worker(self) -> Process:
        """The one that was started last; another where that one has ended."""
        if self.site.running[-1].poll() is not None:
            self.site.worker(**{runs.MARK: self.family.mark})
        return self.site.running[-1]

    def run(self, bench: Bench) -> dict[str, Any]:
        """A run of the bench's recipe, once it has a checkpoint."""
        worker = self.worker
        asked = {"parameters": {"recipe": str(bench.recipe)}}
        run: dict[str, Any] = self.site.ask(f"/deployments/{self.deployment}/create_flow_run", asked)
        log = self.site.folder / "start-worker.log"
        training = lambda: len(runs.checkpoints(bench.workspace)) == 1  # noqa: E731
        going = {"SCHEDULED", "PENDING", "RUNNING"}
        runs.wait_for(training, log, lambda: worker.poll() is None and self.state(run)["type"] in going)
        return run

    def state(self, run: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.site.ask(f"/flow_runs/{run['id']}")["state"]
        return found

    def flow(self, run: dict[str, Any]) -> int:
        """The process of the flow: the worker's child."""
        (found,) = [
            one.pid
            for one in self.family.alive(self.worker.pid)
            if one.environ().get("PREFECT__FLOW_RUN_ID") == run["id"] and one.ppid() == self.worker.pid
        ]
        return found


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    shop = Shop(tmp_path_factory.mktemp("site"))
    try:
        yield shop
    finally:
        shop.site.close()
        shop.family.end()


def cancel_by_command(shop: Shop, run: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "prefect", "flow-run", "cancel", run["id"]]
    subprocess.run(command, env=shop.site.environment(), check=True, timeout=60)


def cancel_by_ui(shop: Shop, run: dict[str, Any]) -> None:
    # What the button of Prefect's page sends: setFlowRunState with force.
    state = {"type": "CANCELLING", "name": "Cancelling"}
    shop.site.ask(f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def end_worker(shop: Shop, run: dict[str, Any]) -> None:
    shop.worker.send_signal(signal.SIGTERM)


def kill_worker(shop: Shop, run: dict[str, Any]) -> None:
    shop.worker.kill()


def kill_flow(shop: Shop, run: dict[str, Any]) -> None:
    os.kill(shop.flow(run), signal.SIGKILL)


@pytest.mark.parametrize(
    ("act", "worker_ends", "state"),
    [
        (cancel_by_command, False, {"CANCELLED"}),
        (cancel_by_ui, False, {"CANCELLED"}),
        (end_worker, True, {"CRASHED", "CANCELLED"}),
        (kill_worker, True, {"CRASHED"}),
        (kill_flow, False, {"CRASHED"}),
    ],
)
def test_stopped_under_a_worker(
    whole: Bench,
    shop: Shop,
    tell: Tell,
    act: Callable[[Shop, dict[str, Any]], None],
    worker_ends: bool,
    state: set[str],
) -> None:
    own = whole.copy(f"worker-{act.__name__}")
    runs.forget(own, "train-dpo DPO", "evaluate")
    run = shop.run(own)
    worker = shop.worker
    begun = time.monotonic()
    act(shop, run)
    if worker_ends:
        worker.wait(timeout=runs.PATIENCE)
    shop.family.gone_after(worker.pid)
    seconds = time.monotonic() - begun
    assert seconds < runs.PATIENCE
    (step,) = runs.assert_whole(own.workspace)
    status, record = assert_recorded(own.workspace, "train-dpo DPO", killed=act is kill_flow)
    until(lambda: shop.state(run)["type"] in state, 60)
    ended = shop.state(run)["type"]
    assert_goes_on(own, whole, shop.site)
    tell(act.__name__, f"{seconds:.1f}", f"whole, step {step}", status, record, ended, "bit for bit")
