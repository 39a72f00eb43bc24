"""The stage that trains a reward model on the pairs, with its quality on the held-out ones."""

from pathlib import Path

import pandas as pd

from dpo_core.data.tokens.tokenise import TokenConfig, Tokenise
from dpo_core.methods.reward import METHOD, RewardModelConfig
from dpo_core.models.load import load_tokenizer
from dpo_core.models.reward_model import RewardModel
from dpo_core.rewards.model import score
from dpo_core.rewards.quality import RewardQuality, reward_quality
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.training_job import Run, settings_of, split_to, train
from tasks.store.facts import RewardFacts
from tasks.store.manifest import Manifest

REWARD = Stage(
    METHOD.stage,
    METHOD.version,
    METHOD.artifact,
    RewardFacts,
    lambda workload, label: METHOD.estimate(workload.recipe.reward.model, workload.inputs()),
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
        quality = _reward_quality(given.scratch / "out", pairs, tokens, config.engine.precision, seed)
        output.facts = RewardFacts(**output.facts.model_dump(), quality=quality)
        output.metrics |= _quality_metrics(quality) if quality else {}
        return output

    run = Run(METHOD, config, tokens, seed)
    return run_stage(context, REWARD, {"base": base, "pairs": pairs}, settings_of(run), work)


def _reward_quality(
    model: Path, pairs: Manifest, tokens: TokenConfig, precision: str, seed: int
) -> RewardQuality | None:
    """What the held-out pairs say about a reward model; None where there are none."""

    frame = pd.read_parquet(pairs.path / "data.parquet")
    tokenise = Tokenise(load_tokenizer(model), tokens)
    held_out, _ = tokenise.pairs(frame[frame["split"] == "eval"].to_dict("records"))
    if not held_out:
        return None
    reward_model = RewardModel.load(model)
    sequences = [s for p in held_out for s in (p.chosen, p.rejected)]
    rewards = score(reward_model, sequences, precision)
    lengths = [s.targets for s in sequences]
    # The gain made the rewards one standard deviation wide, whatever the loss had taught them.
    scale = float(reward_model.gain)
    return reward_quality(rewards[0::2], rewards[1::2], lengths[0::2], lengths[1::2], scale=scale, seed=seed)


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
