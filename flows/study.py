"""The comparison flow: from one SFT reference every arm, setting and seed, measured on the same prompts."""

import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect import flow

from dpo_core.methods.dpo import DpoConfig
from dpo_core.training.distributed import share_cores
from flows.preparation import Keep, Prepared, align_on_pairs, prepare
from flows.run_lifecycle import recorded
from tasks.recipe.recipe import Recipe
from tasks.recipe.study import ArmConfig, Settings
from tasks.reports.study_report import FrontierReport
from tasks.runs.record import Started
from tasks.signals import begin_stop, go_on
from tasks.stages.base import Context, StageResult
from tasks.stages.measure import measure
from tasks.stages.online import train_online
from tasks.stages.study_summary import summarise_study
from tasks.stages.training import train_reward
from tasks.store.files import disk_errors
from tasks.store.manifest import Manifest

REFERENCE = "measure SFT"

Made = dict[str, dict[str, Manifest]]
"""For each policy's label: what it needed after the SFT reference, and its measurement."""


@flow(name="dpo-frontier", flow_run_name="{recipe.name}", log_prints=False, persist_result=False)
def frontier(recipe: Recipe, resume: str | None = None) -> FrontierReport:
    """Compare ways to align at equal KL and equal compute. Arguments and errors: `alignment`."""
    return recorded(recipe, resume, run_stages)


def run_stages(context: Context, recipe: Recipe, command: str) -> FrontierReport:
    """All stages, then the study's page."""
    started = Started()
    stages: dict[str, StageResult] = {}
    made = compose(context, recipe, stages)
    with disk_errors(Path(context.workspace), "writing the study's page"):
        return summarise_study(context, recipe, stages, made, started, command)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One policy of the study."""

    arm: ArmConfig
    setting: str
    config: Settings
    seed: int

    @property
    def label(self) -> str:
        """What its stages are called by."""
        return f" {self.arm.name} {self.setting} seed {self.seed}"


def specs(recipe: Recipe) -> Iterator[Spec]:
    """Every policy; all arms of a seed before the next seed, so that a stopped study compares them all."""
    assert recipe.frontier is not None
    for seed in recipe.frontier.seeds:
        for arm in recipe.frontier.arms:
            for setting in arm.settings:
                yield Spec(arm, arm.label(setting), recipe.arm_config(arm, setting), seed)


def compose(context: Context, recipe: Recipe, stages: dict[str, StageResult]) -> Made:
    """The stages in their order. What each came to goes into `stages`."""

    def keep(name: str, result: StageResult) -> Manifest:
        stages[name] = result
        return result.manifest

    study = recipe.frontier
    assert study is not None
    if not context.plan:
        share_cores(study.parallel)
    prepared = prepare(context, recipe, keep)
    recipe = prepared.recipe
    most = max([*study.best_of, recipe.evaluate.samples_per_prompt])
    measured = _measure(context, recipe, prepared, prepared.reference, " SFT", most)
    keep(REFERENCE, measured)
    rewards: dict[int, Manifest] = {}
    if any(arm.reward == "model" for arm in study.arms):
        for seed in study.seeds:
            label = f" seed {seed}"
            labelled = context.model_copy(update={"label": label})
            settings = recipe.reward.model
            trained = train_reward(
                labelled, prepared.reference, prepared.pairs, settings, recipe.tokens, seed
            )
            rewards[seed] = keep(f"train-reward{label}", trained)
    shared = {name: stages[name].manifest for name in ("sample-pairs",) if name in stages}

    def policy(spec: Spec) -> dict[str, StageResult]:
        return _policy(context, recipe, prepared, spec, rewards.get(spec.seed))

    made: dict[str, dict[str, Manifest]] = {}
    for spec, results in _each(study.parallel, policy, list(specs(recipe))):
        for name, result in results.items():
            # Log-probs of one reference are made once and then found by every arm.
            stages.setdefault(name if name.startswith("cache-reference") else name + spec.label, result)
        needed = shared if spec.arm.method == "dpo" or spec.arm.reward == "model" else {}
        if spec.arm.reward == "model":
            needed = needed | {"train-reward": rewards[spec.seed]}
        made[spec.label] = needed | {name: result.manifest for name, result in results.items()}
    return made


def _policy(
    context: Context, recipe: Recipe, prepared: Prepared, spec: Spec, reward_model: Manifest | None
) -> dict[str, StageResult]:
    """Train one policy and measure it."""
    context = context.model_copy(update={"label": spec.label})
    found: dict[str, StageResult] = {}

    def keep(name: str, result: StageResult) -> Manifest:
        found[name] = result
        return result.manifest

    trained = _trained(context, recipe, prepared, spec, reward_model, keep)
    samples = recipe.evaluate.samples_per_prompt
    keep("measure", _measure(context, recipe, prepared, trained, spec.label, samples))
    return found


def _trained(
    context: Context,
    recipe: Recipe,
    prepared: Prepared,
    spec: Spec,
    reward_model: Manifest | None,
    keep: Keep,
) -> Manifest:
    arm, config, source = spec.arm, spec.config, recipe.reward.source
    if arm.method == "dpo":
        assert isinstance(config, DpoConfig)
        guide = config if arm.guided else None
        return align_on_pairs(context, recipe, prepared, keep, config, guide, spec.seed)
    assert not isinstance(config, DpoConfig)
    learned = arm.reward == "model"
    result = train_online(
        context,
        arm.method,
        prepared.reference,
        prepared.judged,
        reward_model if learned else None,
        None if learned else source,
        config,
        recipe.evaluate.sampling,
        recipe.tokens,
        spec.seed,
        source if learned else None,
    )
    return keep(f"train-{arm.method}", result)


def _measure(
    context: Context, recipe: Recipe, prepared: Prepared, policy: Manifest, label: str, samples: int
) -> StageResult:
    config = recipe.evaluate.model_copy(update={"samples_per_prompt": samples})
    return measure(
        context.model_copy(update={"label": label}),
        policy,
        prepared.reference,
        prepared.judged,
        str(recipe.reward.source),
        config,
        recipe.tokens,
        recipe.seed,
    )


def _each(
    parallel: int, work: Callable[[Spec], dict[str, StageResult]], wanted: list[Spec]
) -> Iterator[tuple[Spec, Any]]:
    """The results of all, in order, so many at a time; the first error stops those not yet begun."""
    if parallel == 1:
        for spec in wanted:
            yield spec, work(spec)
        return

    def begin(spec: Spec) -> dict[str, StageResult]:
        go_on()  # a thread that ends its work takes the next before the rest can be called off
        return work(spec)

    with ThreadPoolExecutor(parallel) as pool:
        # Prefect knows a task's flow by context variables, which a thread does not inherit.
        running = [pool.submit(contextvars.copy_context().run, begin, spec) for spec in wanted]
        try:
            for spec, future in zip(wanted, running, strict=True):
                yield spec, future.result()
        except BaseException as error:
            begin_stop(error)  # where it is a stop, the other threads end their work too; else they finish it
            pool.shutdown(wait=True, cancel_futures=True)
            raise
