"""`dpo launch`: what it prints for each cluster, and a whole run whose trainings SLURM runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_core.errors import RecipeError, StageFailed
from flows.commands.cluster import read_cluster
from flows.commands.render import rendered
from tasks.preflight import check_before_run
from tasks.recipe.read import load_recipe
from tests.scenarios.bad_inputs import dpo
from tests.support.runs.tiny_run import Bench
from tests.support.sites import slurm_site

STAGES = [
    "import-model",
    "validate-prompts",
    "prepare-sft",
    "sample-pairs",
    "validate-pairs",
    "cache-reference",
    "train-dpo DPO",
    "train-ppo PPO",
    "evaluate",
]
ONE_RANK = ["import-model", "validate-prompts", "validate-pairs"]
SETTINGS = {
    "local": [],
    "slurm": ["gpus=0", "nodes=2"],
    "kubernetes": ["gpus=0", "nodes=2", "image=dpo:1", "claim=ws", "mount=/ws", "queue=q"],
    "skypilot": ["gpus=0", "nodes=2", "bucket=s3://b", "mount=/ws"],
}


@pytest.mark.parametrize("on", SETTINGS)
def test_render_prints_every_training_and_starts_nothing(bench: Bench, on: str, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"  # of its own: what another run has trained would not be trained again
    text = rendered(str(bench.recipe), [f"workspace={workspace}"], read_cluster(on, None, SETTINGS[on]))
    assert [line[2:] for line in text.splitlines() if line[2:] in STAGES] == STAGES
    for stage in STAGES:
        assert str(workspace / "work" / stage.partition(" ")[0] / "ID" / "job.json") in text
    if on == "kubernetes":
        kinds = [document["kind"] for document in yaml.safe_load_all(text)]
        assert kinds == ["JobSet"] * len(STAGES)
    if on == "skypilot":
        assert [task["num_nodes"] for task in yaml.safe_load_all(text)] == [
            1 if stage in ONE_RANK else 2 for stage in STAGES
        ]
    assert not list(tmp_path.rglob("job.json"))


def test_render_tells_of_trainings_that_are_cached(finished: tuple[Bench, dict]) -> None:
    text = rendered(str(finished[0].recipe), [], read_cluster("slurm", None, SETTINGS["slurm"]))
    assert text.splitlines() == [f"# {stage}: cached, nothing to submit" for stage in STAGES]


def test_a_field_of_the_form_that_is_left_empty_is_as_one_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("image:\nclaim: ws\nmount: /ws\n")
    with pytest.raises(RecipeError, match="image: Field required"):
        read_cluster("kubernetes", str(path), [])


def test_settings_come_from_a_file_and_are_overridden(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: 4\npartition: gpu\n")
    config = read_cluster("slurm", str(path), ["nodes=2"]).settings
    assert (config.nodes, config.partition) == (2, "gpu")


@pytest.mark.parametrize(
    ("on", "settings", "words"),
    [
        ("moon", [], "there is no launcher 'moon'.*local, kubernetes, slurm, skypilot"),
        ("local", ["nodes=2"], "local has no cluster settings"),
        ("kubernetes", ["image=a"], "the settings for kubernetes are not valid: claim: Field required"),
        ("slurm", ["node=2"], "there is no field node"),
        ("slurm", ["environment.HF_TOKEN=abc"], "looks like a secret"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(on: str, settings: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_cluster(on, None, settings)


@pytest.mark.parametrize(
    ("on", "settings", "words"),
    [
        ("slurm", [], "the command sbatch is not installed on this machine.*login node"),
        (
            "skypilot",
            ["bucket=s3://b", "mount={workspace}"],
            "the command sky is not installed on this machine",
        ),
        ("skypilot", ["bucket=s3://b", "mount=/ws"], "is not in the bucket that the nodes mount at /ws"),
        (
            "kubernetes",
            ["image=i", "claim=c", "mount=/ws"],
            "is not on the volume that the pods mount at /ws",
        ),
        (
            "kubernetes",
            ["image=i", "claim=c", "mount={workspace}"],
            "no credentials for a Kubernetes cluster",
        ),
    ],
)
def test_a_cluster_out_of_reach_is_refused_before_anything_runs(
    on: str, settings: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    cluster = read_cluster(on, None, [part.format(workspace=tmp_path) for part in settings])
    with pytest.raises(RecipeError, match=words):
        check_before_run(load_recipe("demo", [f"workspace={tmp_path / 'runs'}"]), cluster=cluster)


def test_what_a_cluster_would_not_see_or_use_is_told_with_the_manifest(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cluster = read_cluster("kubernetes", None, ["image=i", "claim=c", "mount=/ws", "gpus=8"])
    rendered(str(bench.recipe), [f"workspace={tmp_path / 'runs'}"], cluster)
    assert "warning: " in capsys.readouterr().err
    assert "each node has gpus=8, but engine.processes=1 uses only some of them" in caplog.text


def test_a_launch_that_fails_before_it_has_a_record_is_not_resumed_on_this_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StageFailed("the disk is gone", "Run again")

    monkeypatch.setattr("flows.commands.run.run_flow", fail)
    monkeypatch.setattr("tasks.preflight.check_before_run", lambda *_: None)
    monkeypatch.setattr("flows.process.temporary_server.start_temporary_server", lambda: None)
    line = ["launch", str(bench.recipe), "--on", "slurm", "--with", "gpus=0"]
    done = dpo(*line, "--resume", "earlier")
    assert (done.code, done.err.splitlines()[0]) == (4, f"to resume: dpo {' '.join(line)} --resume")


def _on_slurm(bench: Bench, site: Path) -> dict[str, str]:
    commands = slurm_site.install(site)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    return bench.environment() | {"SLURM_SITE": str(site), "PATH": path}


def _trained_on(site: Path) -> None:
    jobs = slurm_site.jobs(site)
    assert [job["state"] for job in jobs] == ["COMPLETED"] * len(STAGES)
    for stage, job in zip(STAGES, jobs, strict=True):
        assert job["options"]["job-name"].startswith(f"dpo-{stage.lower().replace(' ', '-')}-")


@pytest.mark.slow
def test_a_whole_run_trains_on_slurm(bench: Bench, tmp_path: Path) -> None:
    environment = _on_slurm(bench, tmp_path / "site")
    given = ["--with", "gpus=0", "--with", f"python={sys.executable}"]
    given += ["--set", f"workspace={tmp_path / 'ws'}"]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "launch", str(bench.recipe), "--on", "slurm", *given],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _trained_on(tmp_path / "site")


@pytest.mark.slow
def test_a_deployed_run_trains_on_slurm(bench: Bench, tmp_path: Path) -> None:
    """What a worker does with the parameters `on` and `settings` of a deployment."""
    settings = tmp_path / "cluster.yaml"
    settings.write_text(yaml.safe_dump({"gpus": 0, "python": sys.executable}))
    workspace = tmp_path / "ws"
    parameters = {
        "recipe": str(bench.recipe),
        "overrides": [f"workspace={workspace}"],
        "on": "slurm",
        "settings": str(settings),
    }
    code = f"from flows.deployed import deployed\nprint(deployed(**{parameters!r}, return_state=True).name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=_on_slurm(bench, tmp_path / "site"),
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.stdout.strip().endswith("Completed"), done.stdout + done.stderr
    _trained_on(tmp_path / "site")
    (record,) = workspace.glob("runs/*/run.json")
    assert f"dpo launch {bench.recipe} --on slurm --settings {settings}" in record.read_text()
