"""The last stage of a comparison study: points from manifests, the page, and what MLflow keeps of it."""

from collections.abc import Mapping

import numpy as np
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from dpo_core.study import Study, best_of_n
from tasks.recipe.recipe import Recipe
from tasks.reports.study_report import FrontierReport, frontier_report, headline, markdown, write_report
from tasks.runs.record import Started
from tasks.stages.base import Context, StageResult, run_task, tracker_of
from tasks.stages.measure import point_of, read_measurement
from tasks.stages.prefect_artifacts import tell
from tasks.stages.summary import cost_of, run_info, stage_row
from tasks.store.files import run_folder
from tasks.store.manifest import Manifest


@run_task("summary")
def summarise_study(
    context: Context,
    recipe: Recipe,
    stages: Mapping[str, StageResult],
    made: Mapping[str, Mapping[str, Manifest]],
    started: Started,
    command: str,
) -> FrontierReport:
    """Write the study's page, Markdown and picture, record them, and give the report back.

    Args:
        made: for each policy's label, the manifests that it needed and its measurement.
    """
    tracker = tracker_of(context)
    info = run_info(context, recipe, tracker, started, command)
    report = frontier_report(
        study_of(recipe, stages, made),
        info,
        [stage_row(name, result) for name, result in stages.items()],
        cost_of(stages, info.seconds),
        {"description": recipe.description} if recipe.description else {},
    )
    folder = run_folder(context.workspace, context.run_id)
    page = write_report(report, folder)
    parent = tracker.parent
    for path in sorted(folder.iterdir()):
        if path.suffix in (".html", ".md", ".json", ".png"):
            parent.artifact(path)
    parent.metrics(
        {f"area/{_key(row.arm)}": row.area.value for row in report.summary.arms if row.area is not None}
    )
    parent.tag("dpo.verdict", headline(report).text)
    text = markdown(report)
    tell(lambda: create_markdown_artifact(key="run-summary", markdown=text, description=info.name))
    tell(lambda: create_link_artifact(key="run-page", link=page.as_uri(), link_text="Study page"))
    return report


def _key(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in arm.lower())


def study_of(
    recipe: Recipe, stages: Mapping[str, StageResult], made: Mapping[str, Mapping[str, Manifest]]
) -> Study:
    """All that was measured."""
    config = recipe.frontier
    assert config is not None
    base = read_measurement(stages["measure SFT"].manifest)
    rewards_PS = np.asarray(base["rewards_PS"])
    points = []
    for seed in config.seeds:
        for arm in config.arms:
            for setting in map(arm.label, arm.settings):
                needed = dict(made[f" {arm.name} {setting} seed {seed}"])
                points.append(point_of(arm.name, setting, seed, needed.pop("measure"), needed))
    return Study(
        prompts=len(rewards_PS),
        samples_per_prompt=recipe.evaluate.samples_per_prompt,
        reward_name=str(recipe.reward.source),
        reference_rewards_P=rewards_PS.mean(1).tolist(),
        reference_entropy=base["entropy"],
        reference_distinct_1=base["distinct_1"],
        reference_distinct_2=base["distinct_2"],
        reference_length=base["length"],
        best_of=best_of_n(rewards_PS, config.best_of) if config.best_of else [],
        points=points,
        kl_at=config.kl_at,
        drawn=[arm.name for arm in config.arms if arm.drawn],
        seed=recipe.seed,
    )
