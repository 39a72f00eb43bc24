"""The SLURM launcher with commands that keep real SLURM's manners and really run the script."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from deploy.launchers import State
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from dpo_core.errors import RecipeError, StageFailed
from tests.support.runs.training_jobs import wait_until
from tests.support.sites import slurm_site, stand_in
from tests.support.sites.cluster_sites import Slurm, until_over


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    site = Slurm(tmp_path, monkeypatch)
    yield site
    site.close()


def test_the_script_says_what_is_asked_for(tmp_path: Path) -> None:
    config = SlurmConfig(
        nodes=2, gpus=8, cpus=96, memory_gib=900, hours=1.5, partition="gpu", account="lab", qos="high",
        constraint="h100&nvlink", setup="module load cuda\nsource /opt/dpo/bin/activate",
        environment={"NCCL_SOCKET_IFNAME": "ib0"}, options=["--reservation=dpo"], grace_seconds=90,
    )  # fmt: skip
    job = tmp_path / "a 100% folder" / "job.json"
    script = SlurmLauncher(config, "my run").render(job, 8)
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
def test_the_end_of_a_job_is_known_without_accounts_and_without_squeue(
    site: Slurm, tmp_path: Path, what: str
) -> None:
    slurm_site.site(site.folder, accounts=False)
    job = stand_in.job(tmp_path / "work", what)
    launcher = site.make(environment={"A": "b c"})
    handle = launcher.submit(job, 1, job.parent)
    end = State.DONE if what == "done" else State.FAILED
    assert until_over(launcher, handle) is end
    assert "--nnodes=1 --nproc-per-node=1 --node-rank=0 --master-addr=127.0.0.1" in launcher.logs(handle)
    slurm_site.update(1, site.folder, purged=True)  # minutes later squeue has forgotten it
    assert launcher.poll(handle) is end
    assert site.make().find(job.parent) == handle


def test_waiting_jobs_say_what_for_and_are_cancelled_at_once(site: Slurm, tmp_path: Path) -> None:
    slurm_site.site(site.folder, hold="QOSMaxGRESPerUser")
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: "QOSMaxGRES" in launcher.why(handle), "the queue")
    assert launcher.why(handle) == "quota exceeded, waiting in the queue: QOSMaxGRESPerUser"
    assert launcher.poll(handle) is State.RUNNING
    launcher.cancel(handle)
    assert launcher.poll(handle) is State.FAILED
    assert not stand_in.starts(job.parent)


def test_a_job_that_was_killed_names_the_signal(site: Slurm, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    os.kill(stand_in.starts(job.parent)[0], signal.SIGKILL)
    assert until_over(launcher, handle) is State.FAILED
    assert launcher.why(handle) == "its command ended with status 137 (SIGKILL)"


def test_before_the_time_limit_the_job_saves_and_is_queued_again(site: Slurm, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make(hours=1)
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    slurm_site.site(site.folder, limit=True)
    wait_until(lambda: "saved" in launcher.logs(handle), "the signal")
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "the second start")
    assert launcher.poll(handle) is State.RUNNING
    assert not (job.parent / "stopped").exists(), "what the first start left says nothing of the second"
    launcher.cancel(handle, grace=10)
    assert launcher.poll(handle) is State.STOPPED
    assert slurm_site.jobs(site.folder)[0]["starts"] == 2, "a cancelled job is not queued again"


def test_a_job_that_slurm_ends_says_why(site: Slurm, tmp_path: Path) -> None:
    slurm_site.site(site.folder, last=True)
    launcher, works, handles = site.make(), [], []
    reasons = {
        "NODE_FAIL": "a node was lost",
        "PREEMPTED": "preempted by a job of higher priority",
        "OUT_OF_MEMORY": "out of memory",
        "TIMEOUT": "exceeded its time limit",
        "CANCELLED": "cancelled",
    }
    for fate in reasons:
        job = stand_in.job(tmp_path / fate, "stubborn")
        works.append(job.parent)
        handles.append(site.make(fate).submit(job, 1, job.parent))
    wait_until(lambda: all((work / "ready").exists() for work in works), "all nodes")
    for number, fate in enumerate(reasons, 1):
        slurm_site.update(number, site.folder, fate=fate)
    for handle, words in zip(handles, reasons.values(), strict=True):
        assert until_over(launcher, handle) is State.FAILED
        assert words in launcher.why(handle)


def test_a_lost_node_starts_the_job_again(site: Slurm, tmp_path: Path) -> None:
    job = stand_in.job(tmp_path / "work", "wait")
    launcher = site.make()
    handle = launcher.submit(job, 1, job.parent)
    wait_until((job.parent / "ready").exists, "a node")
    slurm_site.update(1, site.folder, fate="NODE_FAIL")
    wait_until(lambda: len(stand_in.starts(job.parent)) == 2, "the second start")
    assert launcher.poll(handle) is State.RUNNING
    launcher.cancel(handle, grace=10)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "Job violates accounting/QOS policy (job submit limit, user's limits)",
            "quota exceeded: sbatch: .*QOS",
        ),
        ("Invalid account or account/partition combination specified", "^sbatch: .*Invalid account"),
    ],
)
def test_a_quota_is_told_from_a_wrong_setting(site: Slurm, tmp_path: Path, answer: str, words: str) -> None:
    site.refuse(answer)
    job = stand_in.job(tmp_path / "work", "done")
    with pytest.raises(StageFailed, match=words):
        site.make().submit(job, 1, job.parent)
