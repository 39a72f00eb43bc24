"""Metrics that are logged with the loss, and WPO's weights: per example, detached."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dpo_core.objectives.common import token_means
from dpo_core.objectives.inputs import PairLogps, UnpairedLogps, required

if TYPE_CHECKING:
    from torch import Tensor


def pair_metrics(logps: PairLogps, beta: float, *, per_token: bool = False) -> dict[str, "Tensor"]:
    """The field's standard metrics of each pair, each (B,), detached.

    `rewards/*` are the implicit rewards beta·h (nats times beta). Accuracy is strict: a tie counts 0. While
    the policy is the reference, every margin is 0 except for rounding, and the accuracy has no meaning: it is
    anywhere from 0 to about one half. Names and definitions as in TRL and the original repository. With
    sequential KLs the rewards are beta·(h + K), as the TDPO repository logs them.

    Args:
        per_token: rewards are beta·(log π)/n, without reference: SimPO and ORPO, as in TRL and their papers.
    """
    if per_token:
        chosen_B, rejected_B = token_means(logps)
    else:
        chosen_B, rejected_B = logps.chosen_ratio_B, logps.rejected_ratio_B
        if logps.chosen_kl_B is not None:
            chosen_B, rejected_B = chosen_B + logps.chosen_kl_B, rejected_B + required(logps, "rejected_kl_B")
    rewards_chosen_B, rewards_rejected_B = beta * chosen_B.detach(), beta * rejected_B.detach()
    return {
        "rewards/chosen": rewards_chosen_B,
        "rewards/rejected": rewards_rejected_B,
        "rewards/margins": rewards_chosen_B - rewards_rejected_B,
        "rewards/accuracies": (rewards_chosen_B > rewards_rejected_B).to(rewards_chosen_B.dtype),
        "logps/chosen": logps.chosen_B.detach(),
        "logps/rejected": logps.rejected_B.detach(),
    }


def unpaired_metrics(logps: UnpairedLogps, beta: float) -> dict[str, "Tensor"]:
    """Rewards beta·h and log-probs by class, each (B,), detached; 0 where the example is of the other class.

    Sum them over the global batch and pass the sums to `class_means`: a batch may lack a class.
    """
    desirable_B = logps.desirable_B.detach()
    classes = {"chosen": desirable_B, "rejected": ~desirable_B}
    values = {"rewards": beta * logps.ratio_B.detach(), "logps": logps.policy_B.detach()}
    metrics = {
        f"{kind}/{name}": value_B * member_B
        for kind, value_B in values.items()
        for name, member_B in classes.items()
    }
    counts = {f"count/{name}": member_B.to(logps.policy_B.dtype) for name, member_B in classes.items()}
    return metrics | counts


def class_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over each class from the sums of `unpaired_metrics`; a class without examples is left out.

    `rewards/margins` is the difference of the two means, as in TRL's KTO trainer, not a mean over pairs.
    """
    means = {
        key: total / sums[f"count/{key.split('/')[1]}"]
        for key, total in sums.items()
        if not key.startswith("count/") and sums[f"count/{key.split('/')[1]}"]
    }
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def wpo_weights(logps: PairLogps) -> "Tensor":
    """The weight of each pair (B,), detached: exp(mean_t s_t(y_w) + mean_t s_t(y_l)).

    s_t = log π(y_t) - log Σ_v π(v)²: how likely a token is, compared with the policy's average sample. WPO
    multiplies the loss of a pair by it, so that pairs which the policy is likely to generate count more.
    Zhou et al., WPO, EMNLP 2024, arXiv 2406.11827, with TRL's sharpness; not clamped, values above 1 occur.
    """
    chosen_B, rejected_B = required(logps, "chosen_sharpness_B"), required(logps, "rejected_sharpness_B")
    return (chosen_B + rejected_B).detach().exp()
