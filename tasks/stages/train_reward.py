"""The stage that trains a reward model on the pairs and measures its quality on the held-out pairs."""

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.estimates.by_method import estimate_training
from dpo_core.jobs.files import RewardQualityJob
from dpo_core.methods.reward import METHOD, RewardModelConfig
from dpo_core.rewards.quality import RewardQuality
from dpo_core.scoring.precision import Precision
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.job import common_fields, run_model_job
from tasks.stages.training_job import TrainingSetup, key_settings_of, train, write_split
from tasks.store.facts import RewardFacts
from tasks.store.manifest import Manifest

REWARD = Stage(
    METHOD.stage,
    METHOD.version,
    METHOD.artifact,
    RewardFacts,
    lambda run, label: estimate_training(METHOD.name, run.recipe.reward.model, run.inputs()),
    overhead=20.0,
    settings=lambda run, label: ("reward.model", run.recipe.reward.model),
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
    """Train a Bradley-Terry reward model on the training pairs; measure it on the held-out pairs."""

    def compute(running: RunningStage) -> Output:
        rows = running.scratch / "train.parquet"
        count = write_split(pairs, "train", rows)
        output = train(running, setup, {"model": str(base.path), "data": str(rows)}, count)
        quality = _reward_quality(running, pairs, tokens, config.engine.precision, seed)
        output.facts = RewardFacts(**output.facts.model_dump(), quality=quality)
        output.metrics |= _quality_metrics(quality) if quality else {}
        return output

    setup = TrainingSetup(METHOD, config, tokens, seed)
    return run_stage(context, REWARD, {"base": base, "pairs": pairs}, key_settings_of(setup), compute)


def _reward_quality(
    running: RunningStage, pairs: Manifest, tokens: TokenConfig, precision: Precision, seed: int
) -> RewardQuality | None:
    """The reward model's quality on the held-out pairs; None if there are none."""
    work = running.scratch / "quality"
    job = RewardQualityJob(
        **common_fields(running) | {"work": str(work)},
        model=str(running.scratch / "out"),
        pairs=str(pairs.path / "data.parquet"),
        tokens=tokens,
        precision=precision,
        seed=seed,
    )
    quality = run_model_job(running, job)
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
