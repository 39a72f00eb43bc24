"""The alignment flow: runs a recipe's stages from the data gate to the run page or the study's page."""

import os
from dataclasses import replace
from typing import TypeAlias

from prefect import flow

from deploy.launchers import Cluster
from flows.preparation import Prepared, RecordResult, prepare
from flows.run_lifecycle import run_with_record
from flows.train_policies import train_policies
from tasks.promotion.model_source import Champion, find_champion
from tasks.recipe.policies import CHAMPION, REFERENCE
from tasks.recipe.recipe import Recipe
from tasks.reports.run_report import RunReport
from tasks.reports.study_report import StudyReport
from tasks.runs.record import StartTime
from tasks.stages.base import Context, StageResult
from tasks.stages.evaluation import EvaluationSettings, evaluate
from tasks.stages.judging import judge_policies
from tasks.stages.measure import measure
from tasks.stages.study_summary import summarise_study
from tasks.stages.suites import evaluate_suites
from tasks.stages.summary import summarise
from tasks.stages.training import TrainedPolicy
from tasks.store.files import disk_errors
from tasks.store.manifest import Manifest

Report: TypeAlias = RunReport | StudyReport


@flow(name="dpo-alignment", flow_run_name="{recipe.name}", log_prints=False, persist_result=False)
def alignment(recipe: Recipe, resume: str | None = None, cluster: Cluster | None = None) -> Report:
    """Align a model, or compare methods in a study, as the recipe describes.

    Args:
        recipe: describes the run completely.
        resume: name of an earlier run to resume, or `latest`; its MLflow run is continued.
        cluster: where its jobs run; by default this machine.

    Raises:
        GateRefused: the data gate refused the data; no later stage ran.
        DpoError: a stage failed; the message says what to do.
    """
    return run_with_record(recipe, resume, run_stages, cluster=cluster)


def run_stages(context: Context, recipe: Recipe, command: str) -> Report:
    """Run all stages, then write the page of the run or study."""
    started = StartTime()
    stages: dict[str, StageResult] = {}
    champion, trained = prepare_train_evaluate(context, recipe, stages)
    with disk_errors(context.workspace, "writing the run's page"):
        if recipe.study is not None:
            return summarise_study(context, recipe, stages, trained, started, command)
        return summarise(context, recipe, stages, trained, champion, started, command)


def prepare_train_evaluate(
    context: Context, recipe: Recipe, stages: dict[str, StageResult]
) -> tuple[Champion | None, list[TrainedPolicy]]:
    """Run the stages in order, each on the manifests of earlier ones, and enter their results into `stages`.

    Returns:
        The champion that the candidate is compared with, if there is one, and the trained policies.
    """

    def keep(result: StageResult) -> Manifest:
        known = stages.get(result.name)
        if known is None or (known.cached and not result.cached):  # another thread may have run the stage
            stages[result.name] = result
        return result.manifest

    prepared = prepare(context, recipe, keep)
    if prepared.recipe.study is not None:
        return None, _train_and_measure_study(context, prepared, keep)
    trained = train_policies(context, prepared, keep)
    return _evaluate(context, prepared, trained, keep), trained


def _evaluate(
    context: Context, prepared: Prepared, trained: list[TrainedPolicy], keep: RecordResult
) -> Champion | None:
    """Evaluate the reference, every policy and the champion on the same held-out rows."""
    recipe, pairs, reference = prepared.recipe, prepared.pairs, prepared.reference
    by_name = {policy.node.policy: policy.manifest for policy in trained}
    policies = {REFERENCE: reference} | {name: by_name[name] for name in recipe.policies}
    champion = None if context.plan else find_champion(context.tracker, recipe.registered_name)
    if champion and champion.manifest.sha256 != policies[recipe.candidate_name].sha256:
        policies[CHAMPION] = champion.manifest
    # Evaluate by a known reward even if policies learned from a reward model: that shows over-optimisation.
    source = recipe.reward.source
    proxy = None if source else next((p.reward_model for p in trained if p.reward_model), None)
    if source is None and proxy is None:
        proxy = prepared.train_reward(context, recipe.seed, "", keep)
    settings = EvaluationSettings(recipe.evaluate, recipe.tokens, recipe.seed, source)
    answers = keep(evaluate(context, policies, prepared.judged, pairs, proxy, settings))
    if recipe.judge:
        keep(judge_policies(context, answers, recipe.judge, recipe.seed))
    if recipe.suites.names:
        for name, model in policies.items():
            labelled = context.labelled(f" {name}")
            keep(evaluate_suites(labelled, name, model, reference, pairs, recipe.suites, recipe.tokens))
    return champion


def _train_and_measure_study(context: Context, prepared: Prepared, keep: RecordResult) -> list[TrainedPolicy]:
    """Train every point of the study, and evaluate all and the reference on the same prompts."""
    recipe = prepared.recipe
    study = recipe.study
    assert study is not None
    if study.parallel > 1 and context.ranks.threads is None:
        # If each job used all cores, their threads would wait for each other, slower than one job at a time.
        threads = max(1, (os.cpu_count() or 1) // study.parallel)
        context = replace(context, ranks=context.ranks.model_copy(update={"threads": threads}))

    def evaluate_point(label: str, model: Manifest, samples: int, keep: RecordResult = keep) -> Manifest:
        context.stop.check()
        config = recipe.evaluate.model_copy(update={"samples_per_prompt": samples})
        result = measure(
            context.labelled(label),
            model,
            prepared.reference,
            prepared.judged,
            EvaluationSettings(config, recipe.tokens, recipe.seed, recipe.reward.source),
        )
        if recipe.suites.names:
            labelled, name = context.labelled(label), label.strip()
            reference, pairs = prepared.reference, prepared.pairs
            keep(evaluate_suites(labelled, name, model, reference, pairs, recipe.suites, recipe.tokens))
        return keep(result)

    samples = recipe.evaluate.samples_per_prompt
    evaluate_point(f" {REFERENCE}", prepared.reference, max([*study.best_of, samples]))

    def then(policy: TrainedPolicy, keep: RecordResult) -> None:
        evaluate_point(policy.node.label, policy.manifest, samples, keep)

    return train_policies(context, prepared, keep, study.parallel, then)
