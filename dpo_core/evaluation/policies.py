"""Policies side by side on held-out prompts: reward, KL, win rate, length, diversity, preference accuracy.

Every policy answers the same prompts; the unit of resampling is the prompt.
"""

from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import Field

from dpo_core.config import Config
from dpo_core.data.tokens.tokenise import Sequence, TokenPair
from dpo_core.errors import StageFailed
from dpo_core.generation.generate import SamplingConfig, sample, seed_for
from dpo_core.methods.online.ppo_math import k1, k3
from dpo_core.methods.online.sampler import Scorer
from dpo_core.scoring.logprobs import CompletionScores, Precision, completion_logps, completion_scores
from dpo_core.statistics import estimates as stats
from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.text import distinct_n, self_bleu


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


@dataclass
class PolicySamples:
    """One policy's answers, prompt by prompt, with each one's KL estimates and the policy's entropy."""

    prompt_index: list[int]
    sequences: list[Sequence]
    ended: list[bool]
    rewards: list[float]
    kl_k1: list[float] = field(default_factory=list)
    kl_k3: list[float] = field(default_factory=list)
    entropy: float | None = None
    """Nats per token: minus the mean log-prob of its own samples."""
    entropies: list[float] = field(default_factory=list)
    """Nats per token of each sample: the mean entropy of the next-token distributions along it."""
    texts: list[str] = field(default_factory=list)
    """The completions as people read them."""


def sample_policy(
    model: Any,
    prompts: Seq[tuple[tuple[int, ...], str]],
    config: EvaluateConfig,
    *,
    scorer: Scorer,
    eos_id: int | Collection[int],
    seed: int,
    progress: Callable[[int], None],
) -> PolicySamples:
    """Draw `samples_per_prompt` completions of every prompt and score them. KL is filled in later."""
    index = [i for i in range(len(prompts)) for _ in range(config.samples_per_prompt)]
    drawn = sample(
        model,
        [prompts[i][0] for i in index],
        config.sampling,
        eos_id=eos_id,
        seed=seed_for(seed, "evaluate"),
        progress=progress,
    )
    sequences = [Sequence(prompts[i][0], c.ids) for i, c in zip(index, drawn, strict=True)]
    rewards = scorer(sequences, [prompts[i][1] for i in index])
    return PolicySamples(index, sequences, [c.ended for c in drawn], rewards)


def sequence_logps(
    model: Any, sequences: Seq[Sequence], precision: Precision, token_budget: int
) -> list[torch.Tensor]:
    """Token log-probs of each sequence's completion, in order."""
    found: dict[int, torch.Tensor] = {}
    for logps in completion_logps(model, sequences, precision, token_budget):
        found |= logps
    return [found[i] for i in range(len(sequences))]


def own_scores(
    model: Any, sequences: Seq[Sequence], precision: Precision, token_budget: int
) -> tuple[list[torch.Tensor], list[float]]:
    """Token log-probs of a policy's own samples, and the mean entropy along each in nats per token."""
    found: dict[int, CompletionScores] = {}
    for scores in completion_scores(model, sequences, precision, token_budget, entropy=True):
        found |= scores
    listed = [found[i] for i in range(len(sequences))]
    return [one.logps for one in listed], [
        float(one.entropy.double().mean()) for one in listed if one.entropy is not None
    ]


def kl_estimates(policy: Seq[torch.Tensor], reference: Seq[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Sequence KL(π‖π_ref) in nats of each sample, from its own tokens: estimators k1 and k3 (Schulman 2020).

    Unbiased only for samples of the policy at temperature 1 without top-k or top-p. k1 is noisier and may be
    negative; k3 is never negative. Summed over the tokens in float64.
    """
    both = [(ours.double(), theirs.double()) for ours, theirs in zip(policy, reference, strict=True)]
    return [float(k1(*pair).sum()) for pair in both], [float(k3(*pair).sum()) for pair in both]


def summarise(
    samples: PolicySamples, baseline: PolicySamples | None, *, seed: int, length: int
) -> dict[str, Any]:
    """The row of one policy, as plain data. Intervals at 95 %, over prompts (`statistics.estimates`).

    Args:
        baseline: the reference's samples; None when `samples` are the reference's own.
        length: tokens to which completions are cut for distinct-2, the same for every policy.
    """
    # A single prompt cannot be resampled: the interval is then over its samples, and n says so.
    clusters = samples.prompt_index if len(set(samples.prompt_index)) > 1 else None
    row: dict[str, Any] = {
        "reward": _data(stats.bootstrap_mean(samples.rewards, clusters, seed=seed)),
        "length": _data(
            stats.bootstrap_mean([len(s.completion) for s in samples.sequences], clusters, seed=seed)
        ),
        "distinct_1": distinct_n([s.completion for s in samples.sequences], 1, length=length),
        "distinct_2": distinct_n([s.completion for s in samples.sequences], 2, length=length),
        "entropy": samples.entropy,
        "ended": float(np.mean(samples.ended)),
    }
    by_prompt: dict[int, list[str]] = {}
    for index, text in zip(samples.prompt_index, samples.texts, strict=False):
        by_prompt.setdefault(index, []).append(text)
    if len(by_prompt) > 1 and min(map(len, by_prompt.values())) > 1:
        row["self_bleu"] = _data(stats.share(self_bleu(list(by_prompt.values()))))
    if samples.entropies:
        row["predictive_entropy"] = _data(stats.bootstrap_mean(samples.entropies, clusters, seed=seed))
    if baseline is not None:
        row["kl"] = _data(stats.bootstrap_mean(samples.kl_k1, clusters, seed=seed))
        row["kl_k3"] = _data(stats.bootstrap_mean(samples.kl_k3, clusters, seed=seed))
        if baseline.prompt_index != samples.prompt_index:
            raise StageFailed("two policies answered different prompts", "Run the evaluation again")
        row["gain"] = _data(stats.paired_bootstrap(samples.rewards, baseline.rewards, clusters, seed=seed))
        row["win_rate"] = _data(stats.win_rate(samples.rewards, baseline.rewards, clusters))
    return row


def preference_accuracy(
    pairs: Seq[TokenPair], policy: Seq[torch.Tensor], reference: Seq[torch.Tensor]
) -> Estimate:
    """Share of held-out pairs whose implicit reward prefers the chosen answer (strict), Wilson interval.

    `policy` and `reference` hold token log-probs, chosen and rejected in turn.
    """
    ratios = [float(p.double().sum() - r.double().sum()) for p, r in zip(policy, reference, strict=True)]
    wins = sum(w > loser for w, loser in zip(ratios[0::2], ratios[1::2], strict=True))
    return stats.wilson(wins, len(pairs))


def _data(estimate: Estimate) -> dict[str, Any]:
    return estimate.model_dump()
