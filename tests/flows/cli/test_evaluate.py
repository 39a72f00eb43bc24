"""Suites and comparisons: of any checkpoint by `dpo evaluate` and `dpo compare`, and of a run's policies."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_core.errors import ModelError, RecipeError, StageFailed
from tasks.stages.standalone_evaluation import EvaluationRequest, evaluate_models
from tasks.stages.suite_results import find_model
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tiny_run import Bench
from tests.support.sites import slurm_site
from tests.support.sites.judge_server import Server, server

__all__ = ["server"]  # a fixture

ROWS = [
    ("helpful", "Name a sea.", "The North Sea is a sea.", "No."),
    ("helpful", "Name a sea.", "The Baltic.", "I will not say."),
    ("honest", "Is the soup warm?", "It came cold.", "Yes, it is the best soup of the world."),
    ("honest", "Is the bread good?", "The bread was good and warm.", "Who knows."),
    ("harmless", "Tell me a story about a house.", "A quiet story about a house by the sea.", "Bad."),
    ("harmless", "Say good.", "good", "bad and boring"),
]
PROMPTS = ["The film was", "I ordered the soup", "After two weeks", "This is", "A long story", "The battery"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one suite, training data that hold one of its prompts, and prompts to answer."""
    folder = tmp_path_factory.mktemp("data")
    keys = "subset", "prompt", "chosen", "rejected"
    write_rows(folder / "hhh_alignment.jsonl", [dict(zip(keys, row, strict=True)) for row in ROWS])
    write_rows(folder / "train.jsonl", [{"prompt": "Say good.", "chosen": "good", "rejected": "no"}])
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(make_tiny_model(folder / name, seed)) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def stories(shared: Path) -> Path:
    folder = shared / "models" / "stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the model stories260K is not at {folder}")
    return folder


def request(data: Path, **changes: Any) -> EvaluationRequest:
    asked: dict[str, Any] = {
        "suites": ["hhh"], "data": str(data), "settings": {"precision": "fp32"},
        "tokens": {"max_length": 128, "max_prompt_length": 64},
    }  # fmt: skip
    return EvaluationRequest.model_validate(asked | changes)


def test_the_command_evaluates_a_checkpoint(data: Path, models: list[str], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    done = bench.dpo(
        "evaluate", models[0], "--suite", "hhh", "--data", str(data), "--reference", models[1],
        "--train", str(data / "train.jsonl"), "--set", "tokens.max_length=128",
        "--set", "tokens.max_prompt_length=64", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (suite,) = report["suites"]
    assert (suite["items"], suite["contaminated"]) == (6, 1)
    names = {measure["name"] for measure in suite["measures"] if not measure["subset"]}
    assert {"accuracy", "margin", "brier", "nll", "likelihood_accuracy"} <= names
    overall = next(m for m in suite["measures"] if m["name"] == "accuracy" and not m["subset"])
    assert overall["estimate"]["n"] == 5
    assert overall["clean"]["n"] == 4
    assert {m["subset"] for m in suite["measures"]} == {"", "helpful", "honest", "harmless"}
    (folder,) = (bench.workspace / "evaluations").glob("evaluation-*")
    assert "HHH alignment" in (folder / "page.html").read_text()
    (kept,) = json.loads((folder / "results.json").read_text())
    assert len(kept["items"]) == 6
    assert list(kept["contaminated"].values()) == ["exact"]
    assert report["command"].endswith("--json")


def test_a_suite_is_not_asked_twice(data: Path, models: list[str], tmp_path: Path) -> None:
    first, _ = evaluate_models(models[:1], request(data), tmp_path)
    stored = {path: path.stat().st_ino for path in (tmp_path / "evaluations").glob("hhh-*.json")}
    again, _ = evaluate_models(models[:1], request(data), tmp_path)
    assert again.suites == first.suites
    assert {path: path.stat().st_ino for path in stored} == stored
    (path,) = stored
    path.write_text(path.read_text()[:-40])  # damaged: asked again
    mended, _ = evaluate_models(models[:1], request(data), tmp_path)
    assert mended.suites == first.suites
    evaluate_models(models[:1], request(data, settings={"precision": "bf16"}), tmp_path)
    evaluate_models(models[1:], request(data), tmp_path)
    assert len(list((tmp_path / "evaluations").glob("hhh-*.json"))) == 3, "other settings, another model"


@pytest.mark.slow
def test_a_cluster_puts_the_model_through_the_suites(data: Path, models: list[str], tmp_path: Path) -> None:
    commands = slurm_site.install(tmp_path / "site")
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    bench = Bench(tmp_path)
    given = ["--suite", "hhh", "--data", str(data), "--workspace", str(bench.workspace), "--json"]
    given += ["--on", "slurm", "--with", "gpus=0", "--with", f"python={sys.executable}"]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "evaluate", models[0], *given],
        env=bench.environment() | {"SLURM_SITE": str(tmp_path / "site"), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["suites"][0]["items"] == len(ROWS)
    (job,) = slurm_site.jobs(tmp_path / "site")
    assert job["state"] == "COMPLETED"
    assert job["options"]["job-name"].startswith("dpo-suites")


def test_two_models_are_compared_item_by_item_and_by_a_judge(
    data: Path, models: list[str], tmp_path: Path
) -> None:
    asked = request(
        data,
        prompts={"path": str(data / "prompts.jsonl")},
        answers={"max_new_tokens": 8, "precision": "fp32"},
        judge={
            "kind": "reward",
            "source": f"{Path(__file__).parents[2] / 'support' / 'runs' / 'vowels.py'}:vowels",
        },
    )
    report, page = evaluate_models(models, asked, tmp_path)
    (comparison,) = report.comparisons
    assert (comparison.candidate, comparison.baseline) == ("one", "two")
    tested = [row for row in comparison.rows if row.p_holm is not None]
    assert {row.measure for row in tested} == {"likelihood_accuracy", "likelihood_accuracy_per_token"}
    (rate,) = report.win_rates
    assert rate.wins + rate.ties + rate.losses == len(PROMPTS)
    assert rate.rate.n == len(PROMPTS)
    assert [sample.prompt for sample in report.samples] == PROMPTS
    answers = json.loads(page.with_name("answers.json").read_text())
    assert [list(answer["completions"]) for answer in answers] == [["one", "two"]] * len(PROMPTS)
    mirrored, _ = evaluate_models(models[::-1], asked, tmp_path)
    assert mirrored.win_rates[0].rate.value == pytest.approx(1 - rate.rate.value)


def test_models_without_a_common_way_of_asking_are_asked_alike(
    data: Path, models: list[str], stories: Path, tmp_path: Path
) -> None:
    """One has a chat template and the other none: neither is asked in chat, and what differs is compared."""
    report, _ = evaluate_models([models[0], str(stories)], request(data), tmp_path)
    (comparison,) = report.comparisons
    assert len(comparison.rows) > 2
    with pytest.raises(StageFailed, match="stories260K has another vocabulary than one") as refused:
        evaluate_models(models[:1], request(data, reference=str(stories)), tmp_path)
    assert refused.value.exit_code == RecipeError.exit_code


def test_a_conversation_is_refused_before_the_suites_run_if_a_model_has_no_template(
    data: Path, models: list[str], stories: Path, tmp_path: Path
) -> None:
    chat = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    asked = request(data, prompts={"path": str(tmp_path / "chat.jsonl")})
    with pytest.raises(ModelError, match=r"stories260K has no chat template.*tokens\.template"):
        evaluate_models([models[0], str(stories)], asked, tmp_path / "runs")
    assert not (tmp_path / "runs" / "evaluations").exists(), "no suite was computed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suites": ["hellaswag"]}, "there is no suite 'hellaswag'.*hhh"),
        ({"suites": ["gsm8k"]}, "of the suite gsm8k is not in .*openai/grade-school-math"),
        ({"suites": ["mbpp"]}, "runs code that the model writes, which is not allowed.*--run-code"),
        ({"suites": []}, "there is nothing to evaluate.*--suite"),
    ],
)
def test_what_cannot_be_asked_is_said(
    data: Path, models: list[str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluate_models(models[:1], request(data, **changes), tmp_path)


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no model dpo-x, so it has no champion yet"):
        find_model("models:/dpo-x@champion", tmp_path)


@pytest.mark.slow  # the models of a run are found by test_online_methods, suites and judge run above
def test_every_policy_of_a_run_is_put_through_the_suites_and_before_a_judge(
    finished: tuple[Bench, dict[str, Any]], data: Path, server: Server
) -> None:
    bench = finished[0].copy("suites")
    sets = [
        "suites.names=[hhh]", f"suites.data={data}", "suites.settings.precision=fp32", "judge.kind=llm",
        f"judge.endpoint.base_url={server.url}", "judge.endpoint.model=rule",
    ]  # fmt: skip
    report = bench.run(*(part for one in sets for part in ("--set", one)))
    assert {name for name, state in bench.states(report).items() if state == "ran"} == {
        "suites SFT", "suites DPO", "suites PPO", "judge",
    }  # fmt: skip
    rates = {(rate["a"], rate["b"], rate["judge"]): rate for rate in report["win_rates"]}
    reward = next(name for _, _, name in rates if name != "rule")
    assert rates.keys() == {(a, "SFT", judge) for a in ("DPO", "PPO") for judge in (reward, "rule")}
    judged = rates["DPO", "SFT", "rule"]
    assert judged["wins"] + judged["ties"] + judged["losses"] == 12, "two answers to each of six prompts"
    # Answers of equal length make the judge contradict itself, which is a tie; others never do.
    assert judged["position_consistency"] >= (judged["wins"] + judged["losses"]) / 12
    assert judged["requests"] == len(server.asked) - rates["PPO", "SFT", "rule"]["requests"]
    assert [row["policy"] for row in report["suites"]] == ["SFT", "DPO", "PPO"]
    (comparison,) = report["comparisons"]
    assert (comparison["candidate"], comparison["baseline"]) == ("DPO", "SFT")
    assert {"accuracy", "brier", "likelihood_accuracy"} <= {row["measure"] for row in comparison["rows"]}
    sft = next(m for m in report["suites"][0]["measures"] if m["name"] == "accuracy" and not m["subset"])
    assert sft["estimate"]["value"] == 0.5, "it is no distance from itself"
    rules = {reason["rule"]: reason["passed"] for reason in report["decision"]["reasons"]}
    assert rules["min_prompts"] is False, "six prompts are too few to promote on"
    assert report["decision"]["promote"] is False
    assert "no_regression" in rules
    page = (bench.workspace / "runs" / report["run"]["name"] / "page.html").read_text()
    assert "Do not promote" in page
    assert "HHH alignment" in page
    # A policy of the run can be named where a model is expected.
    path = find_model(f"{report['run']['name']}:PPO", bench.workspace)
    assert (path / "model.safetensors").is_file()
    with pytest.raises(RecipeError, match="has no policy GRPO"):
        find_model(f"{report['run']['name']}:GRPO", bench.workspace)
