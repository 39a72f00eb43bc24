"""What a training job file says: what to train, from what, with which settings, and where to write."""

from typing import Any, Literal

from dpo_core.config import Config
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import StageFailed
from dpo_core.generation.generate import SamplingConfig
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.grpo import GroupConfig
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.methods.ppo import PpoConfig
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.methods.sft import SftConfig


class Job(Config):
    """One training job."""

    kind: Literal["sft", "dpo", "reward", "ppo", "grpo", "online"]
    """What to train."""
    model: str
    """Checkpoint folder that training starts from."""
    data: str
    """Parquet file: demonstrations, pairs (or unpaired rows) or prompts, by kind."""
    out: str
    """Folder of the finished model."""
    work: str
    """Folder for checkpoints, metrics and the result; survives a kill."""
    tokens: TokenConfig
    """How text becomes tokens."""
    seed: int
    """Order of examples and sampling."""
    sft: SftConfig | None = None
    """Settings of kind sft."""
    dpo: DpoConfig | None = None
    """Settings of kind dpo."""
    ppo: PpoConfig | None = None
    """Settings of kind ppo."""
    grpo: GroupConfig | None = None
    """Settings of kind grpo."""
    online: OnlineDpoConfig | None = None
    """Settings of kind online."""
    reward: RewardModelConfig | None = None
    """Settings of kind reward."""
    sampling: SamplingConfig | None = None
    """How the kinds that train on their own samples draw them."""
    reward_source: str | None = None
    """Their reward: a name for `rewards.load_reward`, or the folder of a reward model."""
    gold_source: str | None = None
    """A known reward that is logged beside a learned one and never trained on."""
    reference: str | None = None
    """DPO: shard of reference log-probs. Kinds that sample: checkpoint folder of the reference."""
    live_reference: str | None = None
    """DPO: checkpoint folder of the reference, for objectives that need it in memory."""
    policy_is_reference: bool = True
    """DPO: the policy starts as the reference, so that the first loss is known."""
    trusted_code: tuple[str, ...] = ()
    """sha256 of the Python files that ship with models and may run; see `remote_code`."""

    @property
    def settings(self) -> Any:
        """The settings of this job's kind."""
        settings = getattr(self, self.kind)
        if settings is None:
            raise StageFailed(f"the job of kind {self.kind} carries no settings for it", "Write them")
        return settings
