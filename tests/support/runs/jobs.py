"""Jobs that compute with a model without training it: on several ranks, killed in the middle, and resumed."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from deploy.launchers import LocalLauncher, torchrun
from deploy.launchers.base import tail
from dpo_core import ranks
from dpo_core.job import main
from dpo_core.jobs.files import InferenceConfig, ModelJob, write_job
from tests.support.runs import forked

_UNITS = "UNITS_BEFORE_THE_KILL"


def on(work: Path, processes: int) -> dict[str, Any]:
    """The fields of a job file that say where it works and on how many ranks, each with one thread."""
    return {"work": str(work), "ranks": InferenceConfig(processes=processes, threads=1)}


def run_job_file(job: ModelJob) -> dict[str, Any]:
    """Run the ranks of a job; what rank 0 reports."""
    path = write_job(job)
    statuses = forked.ranks(path, job.ranks.processes)
    assert not any(statuses), tail(path.parent, 40)
    result: dict[str, Any] = json.loads((path.parent / "result.json").read_text())
    return result


def run_rendered(job: ModelJob) -> dict[str, Any]:
    """Run the command that the launcher of this machine renders for a job; what its rank 0 reports."""
    command = LocalLauncher().render(write_job(job), job.ranks.processes)
    ended = subprocess.run(
        command, shell=True, env=torchrun.environment(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads((Path(job.work) / "result.json").read_text())
    return result


def kill_in_the_middle(job: ModelJob, units: int) -> None:
    """Run a job whose last rank dies of SIGKILL once it has kept the results of so many units of its maps."""
    path = write_job(job)
    statuses = forked.ranks(path, job.ranks.processes, _die_in_the_middle, **{_UNITS: str(units)})
    assert statuses[-1] == -signal.SIGKILL, tail(path.parent, 40)
    assert not (Path(job.work) / "result.json").exists()


def kept(work: Path) -> dict[Path, list[int]]:
    """Files of partial results, and the units of their map that each holds."""
    listed = {}
    for path in sorted(work.glob("parts/*/part-*.json")):
        listed[path] = [index for index, _ in json.loads(path.read_text().partition("\n")[2])]
    return listed


def killed_and_resumed(job: ModelJob, units: int) -> dict[str, Any]:
    """What a job reports that was killed and run again, which must not compute a kept unit again."""
    kill_in_the_middle(job, units)
    work = Path(job.work)
    before = kept(work)
    assert sum(map(len, before.values())) >= units
    result = run_job_file(job)
    assert_continued(before, kept(work))
    return result


def assert_continued(before: dict[Path, list[int]], after: dict[Path, list[int]]) -> None:
    """Of two results of `kept`: no unit was computed again."""
    assert before.items() < after.items(), "what was kept is still there, and something was left to do"
    for folder in {path.parent for path in after}:
        computed = [unit for path, units in after.items() if path.parent == folder for unit in units]
        assert len(computed) == len(set(computed)), f"a unit of {folder.name} was computed twice"


def _die_in_the_middle(arguments: list[str]) -> int:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    left = int(os.environ[_UNITS])
    add = ranks._Parts.add

    def add_and_die(self: ranks._Parts, results: dict[int, Any]) -> None:
        nonlocal left
        add(self, results)
        left -= len(results)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == world - 1:
        ranks._Parts.add = add_and_die  # type: ignore[method-assign]
    # Keep every unit at once: the kill falls between two units, not between two maps.
    ranks.JobRanks.__init__.__kwdefaults__["keep_seconds"] = 0.0
    return main(arguments)
