"""The arithmetic of group baselines (GRPO, its variants, RLOO): advantages, ratios and losses of tensors.

Shapes: N episodes, B of a micro-batch, R response tokens, right-padded. A group is all episodes of a prompt.

Sources: Shao et al. 2024 (GRPO, arXiv 2402.03300), Liu et al. 2025 (Dr. GRPO, 2503.20783), Yu et al. 2025
(DAPO, 2503.14476), Zheng et al. 2025 (GSPO, 2507.18071), Ahmadian et al. 2024 (RLOO, 2402.14740).
"""

import torch
from torch import Tensor

from dpo_core.methods.grpo import Aggregate, Level, Scale

# As in TRL: a group with equal rewards has advantage 0, not 0/0.
STD_EPSILON = 1e-4


def group_means(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """The mean of each episode's group, (N,)."""
    _, index_N, counts_G = torch.unique(groups_N, return_inverse=True, return_counts=True)
    sums_G = values_N.new_zeros(len(counts_G)).index_add(0, index_N, values_N)
    return (sums_G / counts_G)[index_N]


def group_stds(values_N: Tensor, groups_N: Tensor, sample: bool = True) -> Tensor:
    """The standard deviation of each episode's group, (N,); `sample`: divided by G - 1 (TRL), else by G."""
    _, index_N, counts_G = torch.unique(groups_N, return_inverse=True, return_counts=True)
    squares_N = (values_N - group_means(values_N, groups_N)) ** 2
    sums_G = values_N.new_zeros(len(counts_G)).index_add(0, index_N, squares_N)
    return (sums_G / (counts_G - int(sample)).clamp(min=1)).sqrt()[index_N]


def flat_groups(values_N: Tensor, groups_N: Tensor) -> int:
    """Groups whose values are all equal: they have no advantages and teach nothing."""
    return sum(int(values_N[groups_N == group].unique().numel() == 1) for group in groups_N.unique())


@torch.no_grad()
def group_advantages(
    rewards_N: Tensor, groups_N: Tensor, scale: Scale, batch_std: Tensor | None = None, sample: bool = True
) -> Tensor:
    """Reward minus its group's mean (N,), divided by the group's standard deviation (GRPO, DAPO), by that of
    the whole batch, or not at all (Dr. GRPO).

    Args:
        batch_std: standard deviation of all rewards of all ranks, for scale `batch`.
    """
    rewards_N = rewards_N.double()
    centred_N = rewards_N - group_means(rewards_N, groups_N)
    if scale == "none":
        return centred_N
    if scale == "batch":
        assert batch_std is not None
        return centred_N / (batch_std + STD_EPSILON)
    return centred_N / (group_stds(rewards_N, groups_N, sample) + STD_EPSILON)


@torch.no_grad()
def leave_one_out(rewards_N: Tensor, groups_N: Tensor) -> Tensor:
    """RLOO: reward minus the mean of the group's other rewards, (N,) = G/(G-1)·(reward - group mean)."""
    rewards_N = rewards_N.double()
    _, index_N, counts_G = torch.unique(groups_N, return_inverse=True, return_counts=True)
    count_N = counts_G[index_N].double()
    return count_N / (count_N - 1) * (rewards_N - group_means(rewards_N, groups_N))


def soft_overlong(lengths_N: Tensor, longest: int, cache: int) -> Tensor:
    """DAPO's soft overlong penalty (N,): 0 up to longest - cache tokens, then falling to -1 at `longest`."""
    return ((longest - cache - lengths_N.double()) / cache).clamp(-1.0, 0.0)


def log_ratios(logps_BR: Tensor, old_logps_BR: Tensor, mask_BR: Tensor, level: Level) -> Tensor:
    """log of the probability ratio that is clipped: each token's (B,R), or the sequence's (B,1).

    mean: the geometric mean over the response's tokens (GSPO); sum: the whole response (RLOO).
    """
    difference_BR = torch.where(mask_BR, logps_BR - old_logps_BR, 0.0)
    if level == "token":
        return difference_BR
    total_B1 = difference_BR.sum(1, keepdim=True)
    return total_B1 / mask_BR.sum(1, keepdim=True).clamp(min=1) if level == "mean" else total_B1


def clipped_losses(
    log_ratio: Tensor, advantages_B: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """max(-Aρ, -A·clip(ρ, 1-low, 1+high)), with one advantage A for each response, and where it is clipped.

    Both have the shape of `log_ratio`: (B,R), or (B,1) for a ratio of whole responses.
    """
    ratio = log_ratio.clamp(-20.0, 20.0).exp()  # larger ratios are clipped anyway
    advantages_B1 = advantages_B[:, None].to(ratio.dtype)
    plain = -advantages_B1 * ratio
    clipped = -advantages_B1 * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def aggregate(losses_BR: Tensor, mask_BR: Tensor, how: Aggregate) -> Tensor:
    """The sum that gives the loss when divided by the `denominator` of the global minibatch.

    sequence: the mean of each response's tokens (GRPO). token, constant: every token has the same weight
    (DAPO; Dr. GRPO). A response whose mask is all False contributes 0.
    """
    kept_BR = torch.where(mask_BR, losses_BR, 0.0)
    if how == "sequence":
        return (kept_BR.sum(1) / mask_BR.sum(1).clamp(min=1)).sum()
    return kept_BR.sum()


def denominator(how: Aggregate, responses: float, tokens: float, longest: int) -> float:
    """The number that the sums of `aggregate` over the global minibatch are divided by.

    sequence: its responses. token: its tokens. constant: its responses times the longest length that sampling
    allows, so that the weight of a token does not depend on lengths.
    """
    return {"sequence": responses, "token": max(tokens, 1.0), "constant": responses * longest}[how]
