"""`dpo launch` on stand-ins of three clusters that run every job as a real process: whole runs, a node that
is killed, a full disk, and a flow that is killed while its job continues."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("kubernetes", reason="the extra kubernetes is not installed")
pytest.importorskip("kubeflow_trainer_api", reason="kubeflow-trainer-api is not installed")

from tests.scenarios.faults.disks import SmallDisk, why_not
from tests.scenarios.faults.whole import forget_from
from tests.support.runs.jobs import assert_continued, kept
from tests.support.runs.tiny_run import Bench, prefect_address
from tests.support.runs.tracked import free_port
from tests.support.runs.training_jobs import wait_until
from tests.support.sites import sky_site, slurm_site
from tests.support.sites.kube_server import Server

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
JOBS = 9  # import, two gates, SFT, pairs, log-probs, DPO, PPO, evaluation
ANSWERS = 8  # of each policy to a prompt: an evaluation long enough to be interrupted
# `dpo`, asking the cluster more often: the stand-ins are not busy.
DPO = """
import sys
from deploy.launchers import kubernetes, skypilot, slurm
slurm.SlurmLauncher.pause = kubernetes.KubernetesLauncher.pause = skypilot.SkyPilotLauncher.pause = 0.5
from flows.cli.main import main
sys.argv[0] = "dpo"
main()
"""


class Site:
    """A stand-in of a cluster: how the flow reaches it, and what was submitted to it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.server = name, folder, Server() if name == "kubernetes" else None
        given = {"gpus": 0, "python": sys.executable, "environment": {"OMP_NUM_THREADS": "1"}}
        if self.server:
            self.variables = {"KUBECONFIG": str(self.server.write_config(folder / "kubeconfig"))}
            given |= {"image": "dpo:1", "claim": "ws", "mount": str(folder.parent)}
        else:
            module, variable = {"slurm": (slurm_site, "SLURM_SITE"), "skypilot": (sky_site, "SKY_SITE")}[name]
            path = f"{module.install(folder)}{os.pathsep}{os.environ['PATH']}"
            self.variables = {variable: str(folder), "PATH": path}
        if name == "skypilot":
            given |= {"bucket": "s3://b", "mount": str(folder.parent)}
        self.settings = folder / "cluster.yaml"
        self.settings.write_text(yaml.safe_dump(given))

    def submitted(self) -> int:
        """The number of jobs that were submitted until now."""
        if self.server:
            requests = self.server.cluster.requests
            return sum(r.startswith("POST") and r.endswith("/jobsets") for r in requests)
        return len(list(self.folder.glob("job-*.json")))


class Flow:
    """`dpo launch` of a recipe, and what its evaluation has kept."""

    def __init__(self, site: Site, bench: Bench, *arguments: str) -> None:
        self.bench, self.kept = bench, {}
        self.log = bench.folder / f"launch-{len(list(bench.folder.glob('launch-*')))}.log"
        line = ["launch", str(bench.recipe), "--on", site.name, "--settings", str(site.settings), *arguments]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", DPO, *line],
                env=bench.environment() | site.variables | {"PREFECT_API_URL": prefect_address()},
                cwd=bench.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def until(self, ready: Callable[[], bool]) -> None:
        def look() -> bool:
            assert self.process.poll() is None, self.said()
            return ready()

        wait_until(look, f"the moment in {self.log}", 900)

    def until_sampled(self) -> Path:
        """Wait until the evaluation has kept its first results; its job file."""
        self.until(lambda: bool(self._look()))
        (path,) = self.bench.workspace.glob("work/evaluate/*/job.json")
        assert not (path.parent / "result.json").exists(), "too late to interrupt it"
        return path

    def _look(self) -> dict[Path, list[int]]:
        for work in self.bench.workspace.glob("work/evaluate/*"):
            with contextlib.suppress(FileNotFoundError):  # removed with the work folder
                self.kept |= kept(work)
        return self.kept

    def ended(self) -> int:
        """Its exit status; until then it sees what the evaluation keeps."""
        limit = time.monotonic() + 1500
        while (status := self.process.poll()) is None:
            assert time.monotonic() < limit, self.said()
            self._look()
            time.sleep(0.02)
        return status

    def said(self) -> str:
        return self.log.read_text()

    def evaluation(self) -> Any:
        """The numbers of the newest report, after an end without an error."""
        assert self.ended() == 0, self.said()
        reports = self.bench.workspace.glob("runs/*/report.json")
        newest = max(reports, key=lambda path: path.stat().st_mtime)
        return json.loads(newest.read_text())["evaluation"]


def on(*names: str) -> pytest.MarkDecorator:
    """The clusters of a test: all for whole runs, else those whose launchers differ in it."""
    return pytest.mark.parametrize("site", names, indirect=True)


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(request.param) / "site"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_MASTER_PORT", str(free_port()))
        site = Site(request.param, folder)
        yield site
        if site.server:
            site.server.close()


@pytest.fixture(scope="module")
def longer(finished: tuple[Bench, dict]) -> tuple[Bench, dict]:
    """A finished run of this machine whose evaluation takes some seconds, and its numbers."""
    own = finished[0].copy("longer")
    recipe = yaml.safe_load(own.recipe.read_text())
    recipe["evaluate"]["samples_per_prompt"] = ANSWERS
    recipe["evaluate"]["sampling"]["batch_size"] = 4
    own.recipe.write_text(yaml.safe_dump(recipe))
    return own, own.run()["evaluation"]


@pytest.fixture
def own(longer: tuple[Bench, dict], site: Site, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The longer run, just before its evaluation."""
    own = longer[0].copy(str(site.folder.parent / request.node.originalname))
    forget_from(own, "evaluate")
    yield own
    for process in processes_with(own.folder):  # of a test that failed
        process.kill()


def processes_with(path: Path) -> list[psutil.Process]:
    """The processes whose command lines name a path: with a job file, all of that job on its nodes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if str(path) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@on("slurm", "kubernetes", "skypilot")
def test_a_whole_run_gives_the_numbers_of_this_machine(
    site: Site, finished: tuple[Bench, dict], tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference, report = finished
    own = Bench(site.folder.parent / "whole")
    own.folder.mkdir()
    own.recipe.write_text(reference.recipe.read_text().replace(str(reference.workspace), str(own.workspace)))
    before = site.submitted()
    assert Flow(site, own).evaluation() == report["evaluation"]
    assert site.submitted() - before == JOBS
    assert own.index() == reference.index(), "every artifact, bit for bit"


@on("slurm", "kubernetes")
def test_a_killed_node_changes_no_number(site: Site, own: Bench, longer: tuple[Bench, dict]) -> None:
    """The node of a SLURM job, which does not start again; one of two pods on Kubernetes, which do."""
    two = site.name == "kubernetes"
    flow = Flow(site, own, *(["--with", "nodes=2"] if two else []))
    job = flow.until_sampled()
    for process in processes_with(job):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not two or process.environ()["PET_NODE_RANK"] == "1":
                process.kill()
    before = dict(flow.kept)
    if not two:
        assert flow.ended() == 4
        assert "evaluate failed: its command ended with status 137 (SIGKILL)" in flow.said()
        line = f"dpo launch {own.recipe} --on slurm --settings {site.settings} --resume"
        assert f"to resume: {line}" in flow.said()
        flow = Flow(site, own, "--resume")
    assert flow.evaluation() == longer[1]
    assert_continued(before, flow.kept)


@on("slurm", "kubernetes")
def test_a_full_disk_is_named_and_the_run_continues(
    site: Site, own: Bench, longer: tuple[Bench, dict], tmp_path: Path
) -> None:
    if reason := why_not(tmp_path):
        pytest.skip(reason)
    aside = own.workspace.rename(own.folder / "aside")
    with SmallDisk(own.folder / "disk.img", own.workspace) as disk:
        shutil.copytree(aside, own.workspace, dirs_exist_ok=True)
        flow = Flow(site, own)
        flow.until_sampled()
        disk.fill()
        assert flow.ended() == 4, flow.said()
        (line,) = [line for line in flow.said().splitlines() if line.startswith("error: ")]
        assert f"the disk that holds {own.workspace}" in line
        assert "is full" in line
        assert "Free some space there, then resume the run." in line
        disk.free()
        again = Flow(site, own, "--resume")
        assert again.evaluation() == longer[1]
        assert_continued(flow.kept, again.kept)


@on("slurm", "skypilot")
def test_a_job_that_outlives_its_flow_is_rejoined(site: Site, own: Bench, longer: tuple[Bench, dict]) -> None:
    before = site.submitted()
    flow = Flow(site, own)
    job = flow.until_sampled()
    of_the_job = processes_with(job)
    for process in of_the_job:
        process.suspend()  # a long evaluation
    os.kill(flow.process.pid, signal.SIGKILL)
    flow.process.wait()
    again = Flow(site, own, "--resume")
    again.until(lambda: "evaluate: running" in again.said())
    time.sleep(3)
    assert again.process.poll() is None, again.said()
    assert set(processes_with(job)) == set(of_the_job)
    for process in of_the_job:
        process.resume()
    assert again.evaluation() == longer[1]
    assert site.submitted() - before == 1
