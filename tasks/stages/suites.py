"""The stage that puts one policy through the evaluation suites of the recipe."""

import json

import pandas as pd

from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.evaluation.config import SuitesConfig
from dpo_core.evaluation.contamination import TrainingText, training_texts
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import data_digest, suite_files, without_training_data
from dpo_core.evaluation.suites.registry import find
from dpo_core.methods import estimate
from tasks.recipe.policies import REFERENCE
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.stages.suite_results import suite_result
from tasks.store.facts import Facts
from tasks.store.files import CACHE_FOLDER
from tasks.store.manifest import Manifest

LEFT_OUT = estimate.Work(note="the work of suites and judge is left out")
SUITES = Stage("suites", 1, "suite-results", Facts, lambda workload, label: LEFT_OUT)


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
    """Results of one policy on every suite, items included, with what stands in the training data named.

    Args:
        policy: its name in the tables.
        reference: what implicit rewards are measured against.
        trained_on: the rows whose train split was learned from.
    """
    files = suite_files(config)

    def work(given: Work) -> Output:
        from dpo_core.evaluation.model_under_test import Subject

        frame = pd.read_parquet(trained_on.path / "data.parquet")
        training = TrainingText(training_texts(frame[frame["split"] == "train"]))
        base = Subject(reference.path, REFERENCE, tokens)
        subject = Subject(model.path, policy, tokens, base, context.workspace / CACHE_FOLDER)
        bar = given.progress(1000 * len(files))
        results = []
        for number, (name, file) in enumerate(files.items()):

            def told(done: int, total: int, number: int = number) -> None:
                bar.update(1000 * number + 1000 * done // max(total, 1))

            result, _ = suite_result(context.workspace, find(name), subject, file, config.settings, told)
            results.append(without_training_data(result, training))
        out = given.fresh("out")
        text = json.dumps([result.model_dump(mode="json") for result in results], ensure_ascii=False)
        (out / "suites.json").write_text(text, encoding="utf-8")
        metrics = {
            f"{result.suite}/{measure.name}": measure.estimate.value
            for result in results
            for measure in result.measures
            if not measure.subset
        }
        return Output(out, rows=sum(len(result.items) for result in results), metrics=metrics)

    slice_ = {
        "policy": policy,
        "config": config.model_dump(mode="json", exclude={"data"}),
        "tokens": tokens.model_dump(mode="json"),
        "files": {name: data_digest(find(name), file) for name, file in files.items()},
        "versions": {name: find(name).version for name in files},
    }
    inputs = {"policy": model, "reference": reference, kind_of(trained_on): trained_on}
    return run_stage(context, SUITES, inputs, slice_, work)


def load_suites(manifest: Manifest) -> list[SuiteResult]:
    """What the stage wrote."""
    listed = json.loads((manifest.path / "suites.json").read_text(encoding="utf-8"))
    return [SuiteResult.model_validate(one) for one in listed]
