"""The SLURM launcher with commands that keep real SLURM's manners and really run the script."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deploy.launchers import Launcher, State, slurm
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from dpo_core.errors import RecipeError, StageFailed
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import curve, sft_job, wait_until
from tests.support.sites import slurm_site, stand_in

Make = Callable[..., SlurmLauncher]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    commands = slurm_site.install(folder)
    monkeypatch.setenv("SLURM_SITE", str(folder))
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_KILL_WAIT", 5.0)
    yield folder
    slurm_site.site(folder, hold=None)
    for job in slurm_site.jobs(folder):
        slurm_site.update(job["id"], folder, fate="CANCELLED")
    ended = lambda: all(job["state"] not in slurm_site.WAITS for job in slurm_site.jobs(folder))  # noqa: E731
    wait_until(ended, "the end of all jobs")


@pytest.fixture
def make(site: Path, tmp_path: Path) -> Make:
    """Makes launchers, each as a new process would."""
    python = stand_in.write(tmp_path)

    def make(attempt: int = 1, **settings: Any) -> SlurmLauncher:
        config = SlurmConfig.model_validate({"python": python, "gpus": 0} | settings)
        return SlurmLauncher(config, "my-run", attempt)

    return make


def until_over(launcher: Launcher, handle: str) -> State:
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    return launcher.poll(handle)


def test_the_script_says_what_is_asked_for(tmp_path: Path) -> None:
    config = SlurmConfig(
        nodes=2, gpus=8, cpus=96, memory_gib=900, hours=1.5, partition="gpu", account="lab", qos="high",
        constraint="h100&nvlink", setup="module load cuda\nsource /opt/dpo/bin/activate",
        environment={"NCCL_SOCKET_IFNAME": "ib0"}, options=["--reservation=dpo"], grace_seconds=90,
    )  # fmt: skip
    job = tmp_path / "a 100% folder" / "job.json"
    script = SlurmLauncher(config, "my run", 3).render(job, 8)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert directives[0].startswith("--job-name=dpo-my-run-")
    assert directives[1:] == [
        *("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=96", "--mem=900G"),
        *("--time=90", "--partition=gpu", "--account=lab", "--qos=high", "--constraint='h100&nvlink'"),
        *("--exclusive", "--requeue", "--signal=B:USR1@90", "--open-mode=append"),
        f"--output='{tmp_path}/a 100%% folder/job.log'",
        "--reservation=dpo",
    ]
    assert "export NCCL_SOCKET_IFNAME=ib0" in script
    # sbatch reads directives up to the first command only.
    body = script.split("#SBATCH")[-1]
    assert body.index("module load cuda") < body.index("srun --kill-on-bad-exit=1")
    assert not list(tmp_path.iterdir())


def test_options_that_would_be_more_than_options_are_refused() -> None:
    with pytest.raises(ValidationError, match="write options of sbatch"):
        SlurmConfig(options=["--comment=a\nrm -rf /"])


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint"])
def test_no_setting_adds_a_line_to_the_script(field: str, tmp_path: Path) -> None:
    for ending in ("\n", "\r", "\x0b", "\u2028"):
        with pytest.raises(ValidationError, match="line break"):
            SlurmConfig(**{field: f"a{ending}touch x"})
    script = SlurmLauncher(SlurmConfig(**{field: "a b; $(touch x)"}), "r").render(tmp_path / "job.json", 1)
    assert f"#SBATCH --{field}='a b; $(touch x)'" in script.splitlines()


@pytest.mark.parametrize("name", ["A=1; touch x;B", "A B", "1A", "", "A\nB", "ÄB"])
def test_what_is_no_name_of_a_variable_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="not a valid variable name"):
        SlurmConfig(environment={name: "1"})


def test_a_folder_that_no_line_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be printed"):
        SlurmLauncher(SlurmConfig(), "r").render(tmp_path / "a\nb" / "job.json", 1)


@pytest.mark.parametrize("number", [0, 1, 11_999, 12_000, 4_000_000_007])
def test_the_port_is_none_that_linux_hands_out_itself(number: int, tmp_path: Path) -> None:
    script = SlurmLauncher(SlurmConfig(), "r").render(tmp_path / "job.json", 1)
    (line,) = [line for line in script.splitlines() if line.startswith("export PORT=")]
    said = subprocess.run(
        ["bash", "-c", f"SLURM_JOB_ID={number}; {line}; echo $PORT"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1024 < int(said.stdout) < 32_768


@pytest.mark.parametrize("what", ["done", "fail"])
@pytest.mark.parametrize("accounts", [True, False])
def test_a_job_ends_as_its_files_say(
    make: Make, site: Path, tmp_path: Path, what: str, accounts: bool
) -> None:
    slurm_site.site(site, accounts=accounts)
    job = stand_in.job(tmp_path / "a folder", what)
    (job.parent / "error.json").write_text("{}")  # of an earlier job
    launcher = make(nodes=2, environment={"A": "b c"})
    handle = launcher.submit(job, 1, job.parent)
    assert until_over(launcher, handle) is (State.DONE if what == "done" else State.FAILED)
    assert len(stand_in.starts(job.parent)) == 2
    log = launcher.logs(handle)
    assert "--nnodes=2 --nproc-per-node=1 --node-rank=1 --master-addr=127.0.0.1 --master-port=20001" in log
    if what == "fail":
        assert "the last words of a rank" in log
        assert "its command ended with status" in launcher.why(handle)
    launcher.cancel(handle)  # after the end: nothing to do
    assert make(nodes=2).find(job.parent) == handle
    for one in slurm_site.jobs(site):
        slurm_site.update(one["id"], site, purged=True)  # minutes later squeue has forgotten it
    assert launcher.poll(handle) is (State.DONE if what == "done" else State.FAILED)


def test_cancelled_jobs_save_and_leave_nothing(make: Make, site: Path, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make(nodes=2)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2 and (job.parent / "ready").exists(), "two nodes")
    launcher.cancel(handle, grace=10)
    assert launcher.poll(handle) is State.STOPPED, "although SLURM says FAILED"
    assert slurm_site.jobs(site)[0]["state"] == "FAILED"
    assert not stand_in.alive(job.parent)
    assert "saved" in launcher.logs(handle)


def test_a_job_does_not_bear_the_mark_of_its_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.assert_jobs_lack_the_mark(make(), tmp_path / "work", monkeypatch)


def test_stubborn_jobs_are_killed_after_the_grace_time(make: Make, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "stubborn")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    launcher.cancel(handle, grace=0.5)
    assert not stand_in.alive(job.parent)
    assert launcher.poll(handle) is State.FAILED
    assert launcher.why(handle) == "cancelled"


def test_waiting_jobs_say_what_for_and_are_cancelled_at_once(make: Make, site: Path, tmp_path: Path) -> None:
    slurm_site.site(site, hold="QOSMaxGRESPerUser")
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: "QOSMaxGRES" in launcher.why(handle), "the queue")
    assert launcher.why(handle) == "quota exceeded, waiting in the queue: QOSMaxGRESPerUser"
    assert launcher.poll(handle) is State.RUNNING
    launcher.cancel(handle)
    assert launcher.poll(handle) is State.FAILED
    assert not stand_in.starts(job.parent)


def test_a_job_that_was_killed_names_the_signal(make: Make, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    os.kill(stand_in.starts(job.parent)[0], signal.SIGKILL)
    assert until_over(launcher, handle) is State.FAILED
    assert launcher.why(handle) == "its command ended with status 137 (SIGKILL)"


def test_before_the_time_limit_the_job_saves_and_is_queued_again(
    make: Make, site: Path, tmp_path: Path
) -> None:
    slurm_site.site(site, limit=1.5)
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make(hours=1)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: "saved" in launcher.logs(handle), "the signal")
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "the second start")
    assert launcher.poll(handle) is State.RUNNING
    assert not (job.parent / "stopped").exists(), "what the first start left says nothing of the second"
    launcher.cancel(handle, grace=10)
    assert launcher.poll(handle) is State.STOPPED
    assert slurm_site.jobs(site)[0]["starts"] == 2, "a cancelled job is not queued again"


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        ("NODE_FAIL", "a node was lost"),
        ("PREEMPTED", "preempted by a job of higher priority"),
        ("OUT_OF_MEMORY", "out of memory"),
        ("TIMEOUT", "exceeded its time limit"),
        ("CANCELLED", "cancelled"),
    ],
)
def test_a_job_that_slurm_ends_says_why(
    make: Make, site: Path, tmp_path: Path, fate: str, words: str
) -> None:
    slurm_site.site(site, last=True)
    job = stand_in.job(tmp_path / "work", "stubborn")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    slurm_site.update(1, site, fate=fate)
    assert until_over(launcher, handle) is State.FAILED
    assert words in launcher.why(handle)


def test_a_lost_node_starts_the_job_again(make: Make, site: Path, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    slurm_site.update(1, site, fate="NODE_FAIL")
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "the second start")
    assert launcher.poll(handle) is State.RUNNING
    launcher.cancel(handle, grace=10)


def test_submitting_again_finds_the_job_even_at_the_same_moment(
    make: Make, site: Path, tmp_path: Path
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    handles: list[str] = []
    threads = [
        threading.Thread(target=lambda one=one: handles.append(one.submit(job, 1, job.parent)))
        for one in (make(), make(), make())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 3
    assert len(slurm_site.jobs(site)) == len(set(handles)) == 1
    (job.parent / f"{make().name}.handle").unlink()  # the watcher died before it could write it down
    assert make().find(job.parent) == handles[0]
    assert make(attempt=2).find(job.parent) is None
    make().cancel(handles[0], grace=10)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "quota exceeded",
        ),
        ("Invalid account or account/partition combination specified", "Invalid account"),
    ],
)
def test_a_rejected_job_says_why(make: Make, site: Path, tmp_path: Path, answer: str, words: str) -> None:
    slurm_site.site(site, reject=answer)
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(StageFailed, match=words):
        make().submit(job, 1, job.parent)
    slurm_site.site(site, reject=None)
    launcher = make()
    assert until_over(launcher, launcher.submit(job, 1, job.parent)) is State.DONE


def test_a_job_whose_acceptance_was_lost_is_found(make: Make, site: Path, tmp_path: Path) -> None:
    slurm_site.site(site, lost=True)
    job = stand_in.job(tmp_path / "work", "wait")
    handle = make().submit(job, 1, job.parent)
    assert handle == f"1 {job.parent}"
    assert len(slurm_site.jobs(site)) == 1


def test_a_controller_that_is_away_for_a_while_changes_nothing(
    make: Make, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = make()
    handle = launcher.submit(job, 1, job.parent)
    slurm_site.site(site, away=2)
    assert launcher.poll(handle) is State.RUNNING
    monkeypatch.setattr(slurm, "AWAY", 0.5)
    slurm_site.site(site, away=9)
    with pytest.raises(StageFailed, match="has not answered"):
        launcher.poll(handle)
    slurm_site.site(site, away=0, slow=1)
    monkeypatch.setattr(slurm, "TIMEOUT", 0.3)
    with pytest.raises(StageFailed, match="has not answered"):
        launcher.poll(handle)
    slurm_site.site(site, slow=0)


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(RecipeError, match="login node"):
        SlurmLauncher(SlurmConfig(gpus=0), "my-run").submit(job, 1, job.parent)


@pytest.mark.slow
def test_the_rendered_script_trains_on_two_nodes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real agent, ranks and trainer, one process a node; cut short in the middle, then ended well."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    job = sft_job(tmp_path / "work", make_tiny_model(tmp_path / "model"), epochs=30)
    launcher = make(nodes=2, python=sys.executable)
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: len(curve(job.parent)) > 3, "some steps")
    launcher.cancel(handle, grace=60)
    assert launcher.poll(handle) is State.STOPPED, launcher.logs(handle)
    again = make(attempt=2, nodes=2, python=sys.executable)
    handle = again.submit(job, 1, job.parent)
    wait_until(lambda: again.poll(handle) is not State.RUNNING, "the end")
    assert again.poll(handle) is State.DONE, again.logs(handle)
    assert len(curve(job.parent)) == 120
    assert (job.parent / "out" / "model.safetensors").exists()
