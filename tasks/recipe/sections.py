"""Sections of the recipe that belong to no single stage: reward, cache, registry, tracking."""

from pydantic import Field

from dpo_core.config import Config
from dpo_core.methods.reward import RewardModelConfig


class RewardConfig(Config):
    """The reward of completions."""

    source: str | None = None
    """A known reward: `sentiment`, `package.module:callable`, `file.py:callable` or the address of a server
    (`http://…`, `https://…`). Several with weights are an ensemble, `0.7 * mine.py:score + 0.3 * http://…`:
    each is z-scored within the samples of a prompt. Empty: a reward model is trained on the pairs; it is a
    proxy, and the page says so."""
    model: RewardModelConfig = RewardModelConfig()
    """Training of the reward model; read only when one is trained."""


class CacheConfig(Config):
    """How reference log-probs are computed; it does not change their values."""

    token_budget: int = Field(4096, ge=64)
    """Tokens in one forward pass."""


class RegistryConfig(Config):
    """Registration of the candidate in MLflow."""

    name: str | None = Field(None, min_length=1, pattern=r"^[^/:]+$")
    """Registered model; `dpo-<recipe name>` when empty."""
    alias: str = Field("challenger", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """Alias that is set to this run's model."""


class TrackingConfig(Config):
    """The MLflow server and experiment that record the run."""

    uri: str | None = None
    """MLflow tracking URI; else $MLFLOW_TRACKING_URI, else `mlflow.db` (SQLite) in the workspace."""
    experiment: str | None = None
    """Experiment; `dpo/<recipe name>` if not given."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Further tags of the parent run."""
