"""The arithmetic of PPO for language models: KL, rewards, GAE, whitening and losses of tensors.

Shapes: B episodes, R response tokens, padded on the right. `mask_BR` is True on real tokens, EOS included.
The value at a masked position, NaN included, contributes exactly 0 to every result and gradient.

Sources: Schulman et al. 2017 (arXiv 1707.06347), GAE (1506.02438), Ziegler et al. 2019 (1909.08593), and the
N+ implementation details (2403.17031).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_core.errors import NeedsNewSettings
from dpo_core.methods.rounds import KlEstimator
from dpo_core.scoring.kl import KL_ESTIMATORS

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks (an all-reduce) and returns the sum."""

# A larger probability ratio has no meaning, and its overflow would turn a clipped gradient into NaN.
_MAX_LOG_RATIO = 20.0


def _zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    # Not values * mask: 0 * NaN is NaN.
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor, n_tokens: float | Tensor | None = None) -> Tensor:
    """Mean over the True positions of `mask`, a scalar; 0 for an empty mask.

    Args:
        values: any shape.
        mask: bool, the same shape.
        n_tokens: divide by this count instead of the mask's own; with the count of the whole minibatch the
            means of its micro-batches add up to the mean of the minibatch.
    """
    total = _zero_masked(values, mask).sum()
    return total / (mask.sum().clamp(min=1) if n_tokens is None else n_tokens)


@torch.no_grad()
def masked_whiten(
    values_BR: Tensor,
    mask_BR: Tensor,
    shift_mean: bool = True,
    reduce: Reduce | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean)/sqrt(var + eps) over the mask, (B,R); masked positions are 0.

    The variance is biased (divided by n), as in lm-human-preferences. `shift_mean=False` adds the mean back
    (rewards are scaled, not centred). With `reduce` mean and variance are those of all ranks together.
    """

    def mean(x_BR: Tensor) -> Tensor:
        sums = torch.stack([_zero_masked(x_BR, mask_BR).sum(), mask_BR.sum().double()])
        total, count = sums if reduce is None else reduce(sums)
        return total / count.clamp(min=1)

    wide_BR = values_BR.double()
    center = mean(wide_BR)
    variance = mean((wide_BR - center) ** 2)  # two passes: a difference of large sums would cancel
    whitened_BR = (wide_BR - center) / torch.sqrt(variance + eps)
    if not shift_mean:
        whitened_BR = whitened_BR + center
    return _zero_masked(whitened_BR, mask_BR).to(values_BR.dtype)


def kl_per_token(logps_BR: Tensor, ref_logps_BR: Tensor, mask_BR: Tensor, estimator: KlEstimator) -> Tensor:
    """The chosen estimator (Schulman, "Approximating KL divergence") per token (B,R), 0 where masked.

    It estimates KL(π‖π_ref) only for tokens sampled from π itself, at the temperature of the log-probs.
    """
    logps_BR, ref_logps_BR = _zero_masked(logps_BR, mask_BR), _zero_masked(ref_logps_BR, mask_BR)
    return KL_ESTIMATORS[estimator](logps_BR, ref_logps_BR)


def last_token_index(mask_BR: Tensor) -> Tensor:
    """Index of each response's last real token, (B,) int64.

    Raises:
        ValueError: a row has no real token, or real tokens after padding.
    """
    lengths_B = mask_BR.sum(dim=1)
    right_padded_BR = torch.arange(mask_BR.shape[1], device=mask_BR.device) < lengths_B[:, None]
    bad_B = (lengths_B == 0) | (right_padded_BR != mask_BR).any(dim=1)
    if bad_B.any():
        rows = bad_B.nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of the response mask are empty or not padded on the right")
    return lengths_B - 1


@torch.no_grad()
def per_token_rewards(
    logps_BR: Tensor,
    ref_logps_BR: Tensor,
    mask_BR: Tensor,
    scores_B: Tensor,
    kl_coef: float,
    *,
    estimator: KlEstimator = "k1",
    states_BV: Tensor | None = None,
) -> Tensor:
    """-kl_coef·KL_t, plus the score at the last real token, (B,R), without gradient.

    With k1 the undiscounted sum of a row is score - kl_coef·Σ(log π - log π_ref). The log-probs are those of
    the rollout.

    Args:
        states_BV: the score is added at the last of these states, and the result is (B,V). TRL adds it at the
            state after the last token, if the response leaves room for one.

    Raises:
        ValueError: see `last_token_index`.
    """
    rewards_BR = -kl_coef * kl_per_token(logps_BR, ref_logps_BR, mask_BR, estimator)
    states_BV = mask_BR if states_BV is None else states_BV
    rewards_BR = torch.nn.functional.pad(rewards_BR, (0, states_BV.shape[1] - mask_BR.shape[1]))
    last_B1 = last_token_index(states_BV)[:, None]
    return rewards_BR.scatter_add(1, last_B1, scores_B[:, None].to(rewards_BR.dtype))


@torch.no_grad()
def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages_BR, returns_BR), both 0 where masked.

    δ_t = r_t + γV_{t+1} - V_t with V = 0 after the last real token; A_t = δ_t + γλA_{t+1}; return = A_t + V_t
    from the advantages before any whitening. V_t is the value of the state in which token t is chosen.
    """
    rewards_BR, values_BR = _zero_masked(rewards_BR, mask_BR), _zero_masked(values_BR, mask_BR)
    advantages_BR = torch.zeros_like(values_BR)
    advantage_B = torch.zeros_like(values_BR[:, 0])
    next_value_B = torch.zeros_like(values_BR[:, 0])
    # Padding is on the right with reward and value 0, so the recursion of every row starts from zero.
    for t in range(values_BR.shape[1] - 1, -1, -1):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        advantage_B = delta_B + gamma * lam * advantage_B
        advantages_BR[:, t] = advantage_B
        next_value_B = values_BR[:, t]
    return advantages_BR, advantages_BR + values_BR


def policy_loss(
    logps_BR: Tensor,
    old_logps_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip: float = 0.2,
    n_tokens: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate: mean over the mask of max(-Aρ, -A·clip(ρ, 1 ± clip)), ρ = exp(logp - old logp).

    Args:
        n_tokens: see `masked_mean`; affects the loss only.

    Returns:
        The loss (scalar) and detached scalars over this call's mask: `val/ratio`, `val/ratio_var` (biased
        variance over tokens), `policy/clipfrac_avg` (share of tokens whose clipped term is the larger one),
        `policy/approxkl_avg` = ½ mean (logp - old logp)². TRL dilutes the last one by padding.
    """
    log_ratio_BR = _zero_masked(logps_BR, mask_BR) - _zero_masked(old_logps_BR, mask_BR)
    ratio_BR = log_ratio_BR.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    advantages_BR = _zero_masked(advantages_BR, mask_BR)
    plain_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(plain_BR, clipped_BR), mask_BR, n_tokens)
    with torch.no_grad():
        mean_ratio = masked_mean(ratio_BR, mask_BR)
        stats = {
            "val/ratio": mean_ratio,
            "val/ratio_var": masked_mean((ratio_BR - mean_ratio) ** 2, mask_BR),
            "policy/clipfrac_avg": masked_mean((clipped_BR > plain_BR).to(ratio_BR.dtype), mask_BR),
            "policy/approxkl_avg": 0.5 * masked_mean(log_ratio_BR**2, mask_BR),
        }
    return loss, stats


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip: float = 0.2,
    n_tokens: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ mean over the mask of max((V-R)², (V_clipped-R)²), V_clipped within ± clip of the rollout's value.

    Args:
        n_tokens: see `masked_mean`; affects the loss only.

    Returns:
        The loss (scalar) and `val/clipfrac_avg`, the share of tokens whose clipped error is the larger one.
    """
    values_BR, old_values_BR = _zero_masked(values_BR, mask_BR), _zero_masked(old_values_BR, mask_BR)
    returns_BR = _zero_masked(returns_BR, mask_BR)
    clipped_values_BR = values_BR.clamp(min=old_values_BR - clip, max=old_values_BR + clip)
    plain_BR = (values_BR - returns_BR) ** 2
    clipped_BR = (clipped_values_BR - returns_BR) ** 2
    loss = 0.5 * masked_mean(torch.maximum(plain_BR, clipped_BR), mask_BR, n_tokens)
    with torch.no_grad():
        clipfrac = masked_mean((clipped_BR > plain_BR).to(values_BR.dtype), mask_BR)
    return loss, {"val/clipfrac_avg": clipfrac}


def eos_penalty(scores_B: Tensor, ended_B: Tensor, penalty: float = 1.0, replace: bool = False) -> Tensor:
    """Scores (B,) with a penalty for responses that did not end: score - penalty, or -penalty with `replace`.

    TRL's `missing_eos_penalty` subtracts; the N+ code replaces.
    """
    penalised_B = torch.full_like(scores_B, -penalty) if replace else scores_B - penalty
    return torch.where(ended_B, scores_B, penalised_B)


@dataclass
class AdaptiveKL:
    """The KL coefficient that steers towards a target (Ziegler et al. 2019, §2.2).

    e = clip(KL/target - 1, ±0.2); value ← value·(1 + e·episodes/horizon).
    """

    value: float
    target: float = 6.0
    """Nats per response."""
    horizon: float = 10_000.0
    """Episodes."""

    def update(self, kl: float, n_episodes: int) -> float:
        """Update from the mean summed KL of `n_episodes` episodes (of ALL ranks); returns the new value.

        Raises:
            StageFailed: the KL is not finite.
        """
        if not math.isfinite(kl):
            raise NeedsNewSettings(
                f"the KL to the reference is {kl}, so the KL coefficient cannot be adapted",
                "Look for non-finite log-probs in the rollouts, or lower the learning rate",
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_episodes / self.horizon
        return self.value

    def state_dict(self) -> dict[str, float]:
        """The state that a resumed run needs."""
        return {"value": self.value, "target": self.target, "horizon": self.horizon}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved state.

        Raises:
            KeyError: the state lacks an entry.
        """
        self.value, self.target, self.horizon = state["value"], state["target"], state["horizon"]
