"""The stage that evaluates one policy on the suites of the recipe."""

import json

import pandas as pd

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.estimates import estimate
from dpo_core.evaluation.config import SuitesConfig
from dpo_core.evaluation.contamination import TrainingText, training_texts
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import data_digest, mark_contaminated, suite_files
from dpo_core.evaluation.suites.registry import find
from tasks.recipe.policies import REFERENCE
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.stages.model_jobs import asked_model, jobs_of_stage
from tasks.stages.suite_results import SuiteRequest, suite_results
from tasks.store.facts import Facts
from tasks.store.manifest import Manifest

NOT_ESTIMATED = estimate.EstimatedWork(note="suites and judge are not estimated")
SUITES = Stage("suites", 1, "suite-results", Facts, lambda run, label: NOT_ESTIMATED, job="shared")


@stage_task(SUITES.name, f"{SUITES.name}{{context.label}}")
def evaluate_suites(
    context: Context,
    policy: str,
    model: Manifest,
    reference: Manifest,
    trained_on: Manifest,
    config: SuitesConfig,
    tokens: TokenConfig,
) -> StageResult:
    """Evaluate one policy on every suite, and mark the items that occur in the training data.

    Args:
        policy: its name in the tables.
        reference: the model that implicit rewards compare with.
        trained_on: the rows whose train split the policy learned from.
    """
    files = suite_files(config)

    def compute(running: RunningStage) -> Output:
        frame = pd.read_parquet(trained_on.path / "data.parquet")
        training = TrainingText(training_texts(frame[frame["split"] == "train"]))
        request = SuiteRequest(
            [asked_model(policy, model.path, tokens)],
            {name: file.absolute() for name, file in files.items()},
            config.settings,
            asked_model(REFERENCE, reference.path, tokens),
        )
        by_place, _ = suite_results(request, context.workspace, jobs_of_stage(running))
        results = [mark_contaminated(result, training) for result in by_place.values()]
        out = running.empty_folder("out")
        text = json.dumps([result.model_dump(mode="json") for result in results], ensure_ascii=False)
        (out / "suites.json").write_text(text, encoding="utf-8")
        metrics = {
            f"{result.suite}/{measure.name}": measure.estimate.value
            for result in results
            for measure in result.measures
            if not measure.subset
        }
        return Output(out, rows=sum(len(result.items) for result in results), metrics=metrics)

    key_settings = {
        "policy": policy,
        "config": config.model_dump(mode="json", exclude={"data"}),
        "tokens": tokens.model_dump(mode="json"),
        "files": {name: data_digest(find(name), file) for name, file in files.items()},
        "versions": {name: find(name).version for name in files},
    }
    inputs = {"policy": model, "reference": reference, kind_of(trained_on): trained_on}
    return run_stage(context, SUITES, inputs, key_settings, compute)


def load_suites(manifest: Manifest) -> list[SuiteResult]:
    """Read the results that the stage wrote."""
    listed = json.loads((manifest.path / "suites.json").read_text(encoding="utf-8"))
    return [SuiteResult.model_validate(result) for result in listed]
