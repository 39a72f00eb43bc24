"""A disk that fills up, or is read-only from now on, in every stage of a real run.

One run meets the fault at the first moment, is resumed and meets it at the second, and so on to the last:
what it ends with is what a run left in peace ends with.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.test_alignment import STAGES
from tests.scenarios.faults.disk_runs import MOMENTS
from tests.scenarios.faults.disks import SmallDisk, why_not
from tests.support.runs.tiny_run import Bench

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
SAYS = {
    "full": ("is full", "Free some space there, then resume the run."),
    "read-only": ("is read-only", "Mount it writable again"),
}


@pytest.fixture
def own(bench: Bench, tmp_path: Path) -> Bench:
    """The tiny recipe with a workspace of its own, on which a small disk can be mounted."""
    reason = why_not(tmp_path)
    if reason:
        pytest.skip(reason)
    own = Bench(tmp_path / "flow")
    own.folder.mkdir()
    own.recipe.write_text(bench.recipe.read_text().replace(str(bench.workspace), str(own.workspace)))
    return own


@pytest.mark.parametrize("fault", SAYS)
def test_the_disk_fails_at_every_moment(finished, own, fault):
    reference, whole = finished
    keeper = subprocess.run(
        [sys.executable, "-m", "tests.scenarios.faults.disk_runs", str(own.recipe), fault,
         str(own.folder / "disk.img"),
         str(own.workspace)],
        env=own.environment() | {"PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=own.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert keeper.returncode == 0, keeper.stderr[-5000:]
    *moments, last = map(json.loads, keeper.stdout.splitlines())
    for met in moments:
        print(met)
        assert met["met"], met
        assert (met["error"], met["code"]) == ("StageFailed", 4), met
        assert str(own.workspace) in met["said"]
        for words in SAYS[fault]:
            assert words in met["said"], met
        (status, *reports) = met["records"]
        assert status in ("failed", "running"), "on a full disk the record may stand as it was"
        assert not any(reports), "no half report"
    assert [met["moment"] for met in moments] == MOMENTS
    assert last["index"] == reference.index(), "every artifact, bit for bit"
    assert last["report"]["evaluation"] == whole["evaluation"]
    assert last["children"] == {stage: ["FINISHED"] for stage in sorted(STAGES)}
    assert last["parent"] == "FINISHED"
    assert last["steps"] == [1, 2, 3]
    assert last["record"] == "done"
    assert not last["left"], "nothing unfinished lies about"


def run_into(own: Bench, fault: Callable[[], None], line: str) -> tuple[int, str, float]:
    """`dpo run`, with the fault at a line that it says; exit code, what it said, seconds it then took."""
    log = own.folder / "run.log"
    with log.open("w") as output:
        flow = subprocess.Popen(
            own.command("run", str(own.recipe)),
            env=own.environment(),
            cwd=own.folder,
            stdout=output,
            stderr=output,
        )
    deadline = time.monotonic() + 900
    while line not in log.read_text():
        assert flow.poll() is None, f"the run ended before the fault:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    fault()
    start = time.monotonic()
    return flow.wait(timeout=900), log.read_text(), time.monotonic() - start


@pytest.fixture
def disk(own: Bench) -> Iterator[SmallDisk]:
    with SmallDisk(own.folder / "disk.img", own.workspace) as disk:
        yield disk


def test_a_full_disk_is_said_in_one_line_with_the_way_on(own: Bench, disk: SmallDisk) -> None:
    code, text, seconds = run_into(own, disk.fill, "import-model: running")
    assert code == 4, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert str(own.workspace) in line
    assert all(words in line for words in SAYS["full"])
    assert f"to resume: dpo run {own.recipe} --resume" in text
    assert "Traceback" not in text
    assert seconds < 60, f"it took {seconds:.0f} s to say so"
    again = own.dpo("run", str(own.recipe), "--resume")
    assert again.returncode == 4, again.stderr
    assert "is full (making the workspace)" in again.stderr


def test_a_disk_that_can_only_be_read_is_refused_before_anything_runs(own: Bench, disk: SmallDisk) -> None:
    disk.fail()
    refused = own.dpo("run", str(own.recipe))
    assert refused.returncode == 2
    assert "is read-only (making the workspace: Read-only file system)" in refused.stderr
    assert "Mount it writable again" in refused.stderr
    assert len(refused.stderr.splitlines()) <= 2


def test_a_user_who_may_not_write_is_refused_before_anything_runs(own: Bench) -> None:
    own.workspace.mkdir()
    for folder in [own.folder, *own.folder.parents][:4]:
        folder.chmod(0o755)
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    refused = subprocess.run(
        [*command, *own.command("run", str(own.recipe))],
        env=own.environment() | {"HOME": str(own.folder)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2, refused.stderr
    assert f"no access to {own.workspace}" in refused.stderr
    assert "Make the workspace writable for this user" in refused.stderr
    assert not list(own.workspace.iterdir())
