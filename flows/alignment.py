"""The alignment flow: data gate, reference, pairs, cached log-probs, DPO, baselines, evaluation, page."""

from pathlib import Path

from prefect import flow

from flows.preparation import align_on_pairs, prepare
from flows.run_lifecycle import recorded
from tasks.promotion.champion import NAME, Champion, find_champion
from tasks.recipe.recipe import Recipe
from tasks.reports.run_report import RunReport
from tasks.runs.record import Started
from tasks.stages.base import Context, StageResult, tracker_of
from tasks.stages.evaluation import evaluate
from tasks.stages.judging import judge_policies
from tasks.stages.online import train_online
from tasks.stages.suites import evaluate_suites
from tasks.stages.summary import summarise
from tasks.stages.training import train_reward
from tasks.store.files import disk_errors
from tasks.store.manifest import Manifest


@flow(name="dpo-alignment", flow_run_name="{recipe.name}", log_prints=False, persist_result=False)
def alignment(recipe: Recipe, resume: str | None = None) -> RunReport:
    """Align a model as the recipe says.

    Args:
        recipe: decides everything about the run.
        resume: name of an earlier run to go on with, or `latest`; its MLflow run is continued.

    Raises:
        GateRefused: the data gate refused; nothing after it ran.
        DpoError: a stage failed; the message says what to do.
    """
    return recorded(recipe, resume, run_stages)


def run_stages(context: Context, recipe: Recipe, command: str) -> RunReport:
    """All stages, then the run page."""
    started = Started()
    stages: dict[str, StageResult] = {}
    champion = compose(context, recipe, stages)
    with disk_errors(Path(context.workspace), "writing the run page"):
        return summarise(context, recipe, stages, champion, started, command)


def compose(context: Context, recipe: Recipe, stages: dict[str, StageResult]) -> Champion | None:
    """The stages in their order; each hands a manifest to the next. What each came to goes into `stages`.

    Returns the registered model that the new one is held against, where there is one.
    """

    def keep(name: str, result: StageResult) -> Manifest:
        stages[name] = result
        return result.manifest

    prepared = prepare(context, recipe, keep)
    recipe = prepared.recipe
    seed, tokens, source = recipe.seed, recipe.tokens, recipe.reward.source
    reference, judged, pairs = prepared.reference, prepared.judged, prepared.pairs
    policy = align_on_pairs(context, recipe, prepared, keep, recipe.dpo, recipe.guide, seed)
    policies = {"SFT": reference, "DPO": policy}
    reward_model = None
    if recipe.reward.learned:
        settings = recipe.reward.model
        reward_model = keep("train-reward", train_reward(context, reference, pairs, settings, tokens, seed))
    known, gold = (None, source) if reward_model else (source, None)
    for method, name, config in recipe.online_methods():
        sampling = recipe.evaluate.sampling
        trained = train_online(
            context, method, reference, judged, reward_model, known, config, sampling, tokens, seed, gold
        )
        policies[name] = keep(f"train-{method}", trained)
    champion = None if context.plan else find_champion(tracker_of(context), recipe.registered_name)
    if champion and champion.manifest.sha256 != policy.sha256:
        policies[NAME] = champion.manifest
    # A known reward measures also where the methods learned from the model: that shows over-optimisation.
    proxy = reward_model if source is None else None
    measured = evaluate(context, policies, judged, pairs, proxy, source, recipe.evaluate, tokens, seed)
    answers = keep("evaluate", measured)
    if recipe.judge:
        keep("judge", judge_policies(context, answers, recipe.judge, seed))
    if recipe.suites.names:
        for name, model in policies.items():
            labelled = context.model_copy(update={"label": f" {name}"})
            asked = evaluate_suites(labelled, name, model, reference, pairs, recipe.suites, tokens)
            keep(f"suites {name}", asked)
    return champion
