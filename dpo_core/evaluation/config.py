"""Settings of the evaluation of policies on held-out prompts."""

from pydantic import Field

from dpo_core.config import Config
from dpo_core.generation.config import SamplingConfig
from dpo_core.scoring.precision import Precision


class EvaluateConfig(Config):
    """What is measured and how much of it."""

    prompts: int = Field(64, ge=2)
    """Held-out prompts, at most."""
    pairs: int = Field(256, ge=1)
    """Held-out pairs for the preference accuracy, at most; a seeded choice."""
    samples_per_prompt: int = Field(4, ge=1)
    """Completions of each policy for each prompt."""
    sampling: SamplingConfig = SamplingConfig(precision="fp32")
    """How completions are drawn; at temperature 1 and in fp32, or the KL is that of another policy."""
    precision: Precision = "bf16"
    """Precision of log-probs."""
    token_budget: int = Field(2048, ge=64)
    """Tokens in one forward pass."""
    shown: int = Field(8, ge=0)
    """Prompts shown side by side on the run page."""
