"""Suites run by one rank, and by two that are killed and start again, have the same results: preference,
code, lm-eval by likelihood and in writing, refusals with a classifier."""

from pathlib import Path
from typing import Any

import pytest

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.sandbox import check_sandbox
from dpo_core.generation.config import SamplingConfig
from dpo_core.jobs.files import PER_SUITE, NamedModel, SuitesJob
from dpo_core.ranks import PROGRESS
from tests.support.models.tiny import CHAT_TEMPLATE, make_classifier, make_tiny_model
from tests.support.runs.jobs import kept, killed_and_resumed, on, run_job_file

FILES = {
    "hhh": "preference/hhh_alignment.jsonl.gz",
    "humaneval": "eval/HumanEval.jsonl.gz",
    "truthfulqa_mc": "eval/TruthfulQA.csv.gz",
    "gsm8k": "eval/gsm8k_test.jsonl.gz",
    "xstest": "safety/xstest_prompts.csv",
}
CONTEXT = 4096  # five shots and a program fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one the reference, and a classifier of safe answers."""
    folder = tmp_path_factory.mktemp("suites")
    for seed, name in enumerate(("reference", "policy")):
        make_tiny_model(folder / name, seed, taught=True, max_position_embeddings=CONTEXT)
    make_classifier(folder / "classifier", ["unsafe", "safe"], template=CHAT_TEMPLATE)
    return folder


def job(folder: Path, work: Path, shared: Path, suites: list[str], processes: int = 1) -> SuitesJob:
    tokens = TokenConfig(max_length=CONTEXT, max_prompt_length=CONTEXT - 64)
    policy, reference = (
        NamedModel(name=name, path=str(folder / name), tokens=tokens) for name in ("policy", "reference")
    )
    return SuitesJob(
        **on(work / "work", processes),
        models=[policy],
        model_suites=[("policy", suite) for suite in suites],
        files={suite: str(shared / "data" / FILES[suite]) for suite in suites},
        config=SuiteConfig(
            limit=6,
            precision="fp32",
            token_budget=256,
            samples=2,
            sampling=SamplingConfig(max_new_tokens=8, batch_size=3, precision="fp32"),
            run_code=True,
            classifier=str(folder / "classifier"),
        ),
        reference=reference,
        caches=str(work / "caches"),
    )


def results(reported: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything but the time that it took."""
    listed = [SuiteResult.model_validate(one) for one in reported["results"]]
    return [one.model_dump(mode="json", exclude={"seconds"}) for one in listed]


@pytest.mark.slow  # two ranks of suites, and a killed evaluation, are also below and in test_evaluate
def test_two_ranks_and_a_killed_job_have_the_results_of_one(
    folder: Path, shared: Path, tmp_path: Path
) -> None:
    suites = ["hhh", "truthfulqa_mc", "gsm8k", "xstest"]
    one = run_job_file(job(folder, tmp_path / "one", shared, suites))
    expected = results(one)
    assert [result["suite"] for result in expected] == suites
    assert {measure["name"] for measure in expected[0]["measures"]} >= {"accuracy", "margin", "brier"}
    judged = {item["values"]["safe"] for item in expected[3]["items"]}
    assert len(judged) > 1, "the classifier tells answers apart"
    assert any(item["answer"].strip() for item in expected[2]["items"])
    work = tmp_path / "one" / "work"
    assert int((work / PROGRESS.format(rank=0)).read_text()) == PER_SUITE * len(suites)
    # In the middle of what the reference or a suite after it computes.
    two = job(folder, tmp_path / "two", shared, suites, 2)
    assert results(killed_and_resumed(two, units=9)) == expected
    done = [int((Path(two.work) / PROGRESS.format(rank=rank)).read_text()) for rank in (0, 1)]
    assert sum(done) == PER_SUITE * len(suites)


def test_code_is_run_once_by_two_ranks(folder: Path, shared: Path, tmp_path: Path) -> None:
    try:
        check_sandbox()
    except StageFailed as error:
        pytest.skip(error.problem)
    expected = results(run_job_file(job(folder, tmp_path / "one", shared, ["humaneval"])))
    two = job(folder, tmp_path / "two", shared, ["humaneval"], 2)
    assert results(killed_and_resumed(two, units=1)) == expected
    ran = [held for path, held in kept(Path(two.work)).items() if "programs" in path.parent.name]
    assert ran == [[0]], "a dozen programs are one unit, which one rank runs"
    assert sum(expected[0]["facts"]["answers"].values()) == 12


def test_a_reference_with_other_tokens_is_refused(folder: Path, shared: Path, tmp_path: Path) -> None:
    other = shared / "models" / "stories260K"
    if not (other / "model.safetensors").is_file():
        pytest.skip(f"the model stories260K is not at {other}")
    suites_job = job(folder, tmp_path, shared, ["hhh"])
    assert suites_job.reference is not None
    reference = suites_job.reference.model_copy(update={"name": "stories", "path": str(other)})
    from dpo_core.jobs.suites import run
    from dpo_core.ranks import JobRanks

    with pytest.raises(RecipeError, match="the reference stories has another vocabulary than policy"):
        run(suites_job.model_copy(update={"reference": reference}), JobRanks(Path(suites_job.work)))
