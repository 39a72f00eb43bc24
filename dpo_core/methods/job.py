"""The job file of a training: model, data, settings and output folders."""

from typing import Any, Literal

from dpo_core.config import Config
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.generation.config import SamplingConfig


class Job(Config):
    """One training job."""

    kind: Literal["train"] = "train"
    method: str
    """A name of the method registry."""
    settings: dict[str, Any]
    """Settings of the method."""
    model: str
    """Checkpoint folder of the start."""
    data: str
    """Parquet file: demonstrations, pairs, unpaired rows or prompts, by method."""
    out: str
    """Folder of the finished model."""
    work: str
    """Folder for checkpoints, metrics and the result; survives a kill."""
    tokens: TokenConfig
    """How text becomes tokens."""
    seed: int
    """Order of examples and sampling."""
    sampling: SamplingConfig | None = None
    """Sampling settings, for methods that train on their own samples."""
    reward_source: str | None = None
    """Their reward: a name for `rewards.functions.load_reward`, or the folder of a reward model."""
    gold_source: str | None = None
    """A known reward that is logged beside a learned one and never trained on."""
    reference_logps: str | None = None
    """Shard of reference log-probs, for methods that read cached ones."""
    reference: str | None = None
    """Checkpoint folder of the reference, for methods that need it in memory."""
    policy_is_reference: bool = True
    """The policy starts as the reference, so that the first loss is known."""
    trusted_code: tuple[str, ...] = ()
    """sha256 of the Python files that ship with models and may run; see `remote_code`."""
