"""The method `ppo`: PPO for RLHF; its settings, data and trainer."""

from typing import Literal

from pydantic import Field

from dpo_core.methods.method import ROUNDS, Method
from dpo_core.methods.rounds import KlEstimator, RoundsConfig
from dpo_core.training.config import OptimConfig


class PpoConfig(RoundsConfig):
    """Proximal policy optimisation."""

    kl_coef: float = Field(0.05, ge=0)
    """Weight of the per-token KL penalty in the reward."""
    kl_estimator: KlEstimator = "k1"
    """Estimator of that KL: k1 as in most code, k2 or k3."""
    target_kl: float | None = Field(None, gt=0)
    """Adapt kl_coef so that the KL approaches this, in nats per response; empty: kl_coef is fixed."""
    kl_horizon: float = Field(10_000.0, gt=0)
    """Horizon of that adaptation, in episodes."""
    clip: float = Field(0.2, gt=0)
    """Clip range of the probability ratio."""
    value_clip: float = Field(0.2, gt=0)
    """Clip range of the value update."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the global batch."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance 1 over the global batch, without changing their mean; the N+
    details found it harmful."""
    score_at: Literal["last_token", "after_last"] = "last_token"
    """The token that gets the score: the last real one, or, as in TRL, the one after it if the response is
    shorter than max_new_tokens; the state after the last token then has a value too."""
    critic_optim: OptimConfig = OptimConfig(learning_rate=1e-5, epsilon=1e-5, warmup_fraction=0.0)
    """Optimiser and schedule of the critic. It starts from the reward model if one was trained, else from the
    reference with a head of zeros."""


METHOD = Method(
    name="ppo",
    title="Proximal policy optimisation",
    citation="Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593",
    settings=PpoConfig,
    data="prompts",
    curves=ROUNDS,
    version=3,
    retired={"enabled": True},
    scored=True,
    reference=lambda config: "live",
    total_steps=lambda config, rows: config.iterations,
)
