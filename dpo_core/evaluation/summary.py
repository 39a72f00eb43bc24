"""Summarises one policy's samples: reward, KL, win rate, length and diversity, with intervals.

Every policy answers the same prompts; the unit of resampling is the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import StageFailed
from dpo_core.statistics import estimates as stats
from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.text import distinct_n, self_bleu


@dataclass
class PolicySamples:
    """One policy's answers, ordered by prompt, with their KL estimates and the policy's entropy."""

    prompt_index: list[int]
    sequences: list[TokenSequence]
    ended: list[bool]
    rewards: list[float] = field(default_factory=list)
    kl_k1: list[float] = field(default_factory=list)
    kl_k3: list[float] = field(default_factory=list)
    entropy: float | None = None
    """Nats per token: minus the mean log-prob of its own samples."""
    entropies: list[float] = field(default_factory=list)
    """Nats per token of each sample: the mean entropy of the next-token distributions along it."""
    texts: list[str] = field(default_factory=list)
    """The completions as text."""


def summarise_samples(
    samples: PolicySamples,
    baseline: PolicySamples | None,
    *,
    seed: int,
    length: int,
    name: str = "the policy",
) -> dict[str, Any]:
    """The metrics of one policy as plain data. Intervals at 95 %, over prompts (`statistics.estimates`).

    Args:
        baseline: the reference's samples; None if `samples` are the reference's own.
        length: tokens to which completions are cut for distinct-n, the same for every policy.
        name: of the policy, for errors.

    Raises:
        StageFailed: a value is not finite, or the two answered different prompts.
    """
    # A single prompt cannot be resampled: the interval is then over its samples, and so is n.
    clusters = samples.prompt_index if len(set(samples.prompt_index)) > 1 else None

    def mean(values: Sequence[float], what: str) -> dict[str, Any]:
        return _data(stats.bootstrap_mean(values, clusters, seed=seed, name=f"{name}'s {what}"))

    row: dict[str, Any] = {"reward": mean(samples.rewards, "reward")}
    if samples.sequences:  # a diffusion model writes none
        row |= {
            "length": mean([len(s.completion) for s in samples.sequences], "length"),
            "distinct_1": distinct_n([s.completion for s in samples.sequences], 1, length=length),
            "distinct_2": distinct_n([s.completion for s in samples.sequences], 2, length=length),
            "entropy": samples.entropy,
            "ended": float(np.mean(samples.ended)),
        }
    by_prompt: dict[int, list[str]] = {}
    for index, text in zip(samples.prompt_index, samples.texts, strict=False):
        by_prompt.setdefault(index, []).append(text)
    if samples.sequences and len(by_prompt) > 1 and min(map(len, by_prompt.values())) > 1:
        row["self_bleu"] = _data(stats.share(self_bleu(list(by_prompt.values()))))
    if samples.entropies:
        row["predictive_entropy"] = mean(samples.entropies, "entropy")
    if baseline is not None:
        if samples.kl_k1:
            row["kl"] = mean(samples.kl_k1, "KL")
            row["kl_k3"] = mean(samples.kl_k3, "KL (k3)")
        if baseline.prompt_index != samples.prompt_index:
            raise StageFailed(
                f"{name} and the reference answered different prompts",
                "Remove the folder work/evaluate of the workspace, then resume the run",
            )
        row["gain"] = _data(stats.paired_bootstrap(samples.rewards, baseline.rewards, clusters, seed=seed))
        row["win_rate"] = _data(stats.win_rate(samples.rewards, baseline.rewards, clusters))
    return row


def _data(estimate: Estimate) -> dict[str, Any]:
    return estimate.model_dump()
