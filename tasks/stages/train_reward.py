"""The stage that trains a reward model on the pairs, with its quality on the held-out ones."""

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.estimates.by_method import estimate_training
from dpo_core.jobs.files import RewardQualityJob
from dpo_core.methods.reward import METHOD, RewardModelConfig
from dpo_core.rewards.quality import RewardQuality
from dpo_core.scoring.precision import Precision
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.job import common, run_model_job
from tasks.stages.training_job import Run, settings_of, split_to, train
from tasks.store.facts import RewardFacts
from tasks.store.manifest import Manifest

REWARD = Stage(
    METHOD.stage,
    METHOD.version,
    METHOD.artifact,
    RewardFacts,
    lambda workload, label: estimate_training(METHOD.name, workload.recipe.reward.model, workload.inputs()),
    overhead=20.0,
    settings=lambda workload, label: ("reward.model", workload.recipe.reward.model),
)


@stage_task(REWARD.name, f"{REWARD.name}{{context.label}}")
def train_reward(
    context: Context,
    base: Manifest,
    pairs: Manifest,
    config: RewardModelConfig,
    tokens: TokenConfig,
    seed: int,
) -> StageResult:
    """A Bradley-Terry reward model on the training pairs, with its quality on the held-out ones."""

    def work(given: Work) -> Output:
        rows = given.scratch / "train.parquet"
        count = split_to(pairs, "train", rows)
        output = train(given, run, {"model": str(base.path), "data": str(rows)}, count)
        quality = _reward_quality(given, pairs, tokens, config.engine.precision, seed)
        output.facts = RewardFacts(**output.facts.model_dump(), quality=quality)
        output.metrics |= _quality_metrics(quality) if quality else {}
        return output

    run = Run(METHOD, config, tokens, seed)
    return run_stage(context, REWARD, {"base": base, "pairs": pairs}, settings_of(run), work)


def _reward_quality(
    given: Work, pairs: Manifest, tokens: TokenConfig, precision: Precision, seed: int
) -> RewardQuality | None:
    """What the held-out pairs say about the reward model; None where there are none."""
    work = given.scratch / "quality"
    job = RewardQualityJob(
        **common(given) | {"work": str(work)},
        model=str(given.scratch / "out"),
        pairs=str(pairs.path / "data.parquet"),
        tokens=tokens,
        precision=precision,
        seed=seed,
    )
    quality = run_model_job(given, job)
    return RewardQuality.model_validate(quality) if quality else None


def _quality_metrics(quality: RewardQuality) -> dict[str, float]:
    metrics = {
        "eval_rewards/accuracies": quality.accuracy.value,
        "eval_calibration/ece": quality.ece,
        "eval_calibration/brier": quality.brier,
        "eval_calibration/nll": quality.nll,
        "eval_calibration/temperature": quality.temperature,
        "eval_length/spearman": quality.length_spearman,
        "eval_length/gap_spearman": quality.gap_spearman,
    }
    return {name: value for name, value in metrics.items() if value is not None}
