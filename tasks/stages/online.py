"""The training stages on the policy's own samples: PPO, GRPO and its relatives, RLOO, online DPO."""

from typing import Literal

from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.generation.generate import SamplingConfig
from dpo_core.methods.grpo import GroupConfig
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.methods.ppo import PpoConfig
from dpo_core.rewards.functions import reward_identity
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.training import settings_of, split_to, train
from tasks.store.facts import TrainingFacts
from tasks.store.manifest import Manifest

Method = Literal["ppo", "grpo", "online"]

STAGES: dict[Method, Stage] = {
    "ppo": Stage("train-ppo", 3, "model", TrainingFacts),
    "grpo": Stage("train-grpo", 2, "model", TrainingFacts),
    "online": Stage("train-online", 2, "model", TrainingFacts),
}


@stage_task("train-online", "train-{method}{context.label}")
def train_online(
    context: Context,
    method: Method,
    reference: Manifest,
    prompts: Manifest,
    reward_model: Manifest | None,
    reward: str | None,
    config: PpoConfig | GroupConfig | OnlineDpoConfig,
    sampling: SamplingConfig,
    tokens: TokenConfig,
    seed: int,
    gold: str | None = None,
) -> StageResult:
    """Train from the reference on samples of the training prompts.

    Args:
        reward: the known reward that is learnt from; none where the reward model is.
        gold: a known reward that is logged beside the reward model and never trained on.
    """

    def work(given: Work) -> Output:
        train_file = given.scratch / "prompts.parquet"
        split_to(prompts, "train", train_file, distinct=["prompt", "chat"])
        job = {
            "kind": method,
            "model": str(reference.path),
            "reference": str(reference.path),
            "data": str(train_file),
            "sampling": sampling.model_dump(mode="json"),
            "reward_source": str(reward_model.path) if reward_model else reward,
            "gold_source": gold,
            method: config.model_dump(mode="json"),
        }
        return train(given, job, tokens, seed, config.engine.processes, config.iterations)

    inputs = {"reference": reference, "prompts": prompts}
    if reward_model:
        inputs["reward_model"] = reward_model
    slice_ = settings_of(config, tokens, seed) | {
        "sampling": sampling.model_dump(mode="json"),
        "reward": reward_identity(reward),
    }
    if gold is not None:
        slice_["gold"] = reward_identity(gold)
    return run_stage(context, STAGES[method], inputs, slice_, work)
