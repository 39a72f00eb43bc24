"""The last task of a study: build the report from the manifests, write its page, record it in MLflow."""

from collections.abc import Mapping

import numpy as np

from dpo_core.evaluation.suites.scenes import HELD_OUT_CONTENT
from dpo_core.study import Study, best_of_n
from tasks.recipe.policies import REFERENCE
from tasks.recipe.recipe import Recipe
from tasks.reports.markdown import markdown
from tasks.reports.study_report import StudyReport, headline, study_document, study_report, write_report
from tasks.runs.record import StartTime
from tasks.stages.base import Context, StageResult, run_task
from tasks.stages.measure import MEASURE, point_of, read_measurement
from tasks.stages.suites import SUITES, load_suites
from tasks.stages.summary import cost_of, run_info, stage_row
from tasks.stages.training import TrainedPolicy
from tasks.store.files import run_folder
from tasks.tracking.mlflow_run import metric_keys


@run_task("summary")
def summarise_study(
    context: Context,
    recipe: Recipe,
    stages: Mapping[str, StageResult],
    trained: list[TrainedPolicy],
    started: StartTime,
    command: str,
) -> StudyReport:
    """Write the study's page, Markdown and figures, record them in MLflow, and return the report.

    Args:
        trained: the trained policy of every point.
    """
    info = run_info(context, recipe, started, command)
    report = study_report(
        study_of(recipe, stages, trained),
        info,
        [stage_row(name, result) for name, result in stages.items()],
        cost_of(stages, info.seconds),
        {"description": recipe.description} if recipe.description else {},
    )
    folder = run_folder(context.workspace, context.run_id)
    page = write_report(report, folder)
    parent = context.tracker.parent
    for path in sorted(folder.iterdir()):
        if path.suffix in (".html", ".md", ".json", ".png"):
            parent.artifact(path)
    rows = report.summary.policies
    keys = metric_keys(row.policy for row in rows)
    parent.metrics({f"area/{keys[row.policy]}": row.area.value for row in rows})
    parent.tag("dpo.verdict", headline(report)[0])
    context.prefect_artifacts.send_report(
        report.run.name, markdown(study_document(report)), page, "Study page"
    )
    return report


def study_of(recipe: Recipe, stages: Mapping[str, StageResult], trained: list[TrainedPolicy]) -> Study:
    """All measurements of the study."""
    config = recipe.study
    assert config is not None
    base = read_measurement(stages[f"{MEASURE.name} {REFERENCE}"].manifest)
    rewards_PS = np.asarray(base.rewards_PS)
    points = [
        point_of(
            policy.node,
            policy.manifest,
            stages[MEASURE.name + policy.node.label].manifest,
            policy.needed,
            suite_values(stages, policy.node.label),
        )
        for policy in trained
    ]
    return Study(
        prompts=len(rewards_PS),
        samples_per_prompt=recipe.evaluate.samples_per_prompt,
        reward_name=str(recipe.reward.source),
        reference_rewards_P=rewards_PS.mean(1).tolist(),
        reference_entropy=base.entropy,
        reference_distinct_1=base.distinct_1,
        reference_distinct_2=base.distinct_2,
        reference_length=base.length,
        suites=suite_values(stages, f" {REFERENCE}"),
        best_of=best_of_n(rewards_PS, config.best_of) if config.best_of else [],
        points=points,
        kl_at=config.kl_at,
        drawn=[name for name in recipe.policies if name not in config.hidden],
        seed=recipe.seed,
    )


def suite_values(stages: Mapping[str, StageResult], label: str) -> dict[str, list[float]]:
    """The measures to compare of each suite, item by item; empty without suites.

    They are the first one, which is its main one, under the suite's name, and that of held-out content under
    `SUITE/held_out`.
    """
    result = stages.get(SUITES.name + label)
    if result is None:
        return {}
    values: dict[str, list[float]] = {}
    held_out = HELD_OUT_CONTENT.name
    for suite in load_suites(result.manifest):
        main = suite.measures[0].name
        for name, place in ((main, suite.suite), (held_out, f"{suite.suite}/{held_out}")):
            # Some measures apply to some items only.
            column = [item.values[name] for item in suite.items if name in item.values]
            if name == main or len(column) > 1:
                values[place] = column
    return values
