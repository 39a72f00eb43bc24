"""Measures a policy on held-out prompts: samples, log-probs, KL, preference accuracy."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.evaluation.summary import PolicySamples
from dpo_core.generation.config import seed_for
from dpo_core.generation.generate import sample
from dpo_core.ranks import Ranks
from dpo_core.scoring.completion_scores import completion_scores
from dpo_core.scoring.kl import k1, k3
from dpo_core.scoring.precision import Precision
from dpo_core.statistics import estimates as stats
from dpo_core.statistics.estimates import Estimate


def sample_policy(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    config: EvaluateConfig,
    *,
    eos_id: int | Collection[int],
    seed: int,
    ranks: Ranks | None = None,
) -> PolicySamples:
    """Sample `samples_per_prompt` completions of every prompt. Rewards and KL are set later."""
    index = [i for i in range(len(prompts)) for _ in range(config.samples_per_prompt)]
    drawn = sample(
        model,
        [prompts[i] for i in index],
        config.sampling,
        eos_id=eos_id,
        seed=seed_for(seed, "evaluate"),
        ranks=ranks,
    )
    sequences = [TokenSequence(prompts[i], c.ids) for i, c in zip(index, drawn, strict=True)]
    return PolicySamples(index, sequences, [c.ended for c in drawn])


def sequence_logps(
    model: Any,
    sequences: Sequence[TokenSequence],
    precision: Precision,
    token_budget: int,
    ranks: Ranks | None = None,
) -> list[torch.Tensor]:
    """Token log-probs of each sequence's completion, in order."""
    scores = completion_scores(model, sequences, precision, token_budget, ranks=ranks)
    return [score.logps for score in scores]


def logps_and_entropies(
    model: Any,
    sequences: Sequence[TokenSequence],
    precision: Precision,
    token_budget: int,
    ranks: Ranks | None = None,
) -> tuple[list[torch.Tensor], list[float]]:
    """Token log-probs of a policy's own samples, and the mean entropy along each in nats per token."""
    scores = completion_scores(model, sequences, precision, token_budget, entropy=True, ranks=ranks)
    entropies = [float(s.entropy.double().mean()) for s in scores if s.entropy is not None]
    return [score.logps for score in scores], entropies


def kl_estimates(
    policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Sequence KL(π‖π_ref) in nats of each sample, from its own tokens: estimators k1 and k3 (Schulman 2020).

    Unbiased only for samples of the policy at temperature 1 without top-k or top-p. k1 is noisier and may be
    negative; k3 is never negative. Summed over the tokens in float64.
    """
    both = [(ours.double(), theirs.double()) for ours, theirs in zip(policy, reference, strict=True)]
    return [float(k1(*pair).sum()) for pair in both], [float(k3(*pair).sum()) for pair in both]


def preference_accuracy(
    pairs: Sequence[TokenPair], policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> Estimate:
    """Share of held-out pairs whose implicit reward prefers the chosen answer (strict), Wilson interval.

    `policy` and `reference` hold token log-probs, of chosen and rejected answers alternately.
    """
    ratios = [float(p.double().sum() - r.double().sum()) for p, r in zip(policy, reference, strict=True)]
    wins = sum(w > loser for w, loser in zip(ratios[0::2], ratios[1::2], strict=True))
    return stats.wilson(wins, len(pairs))
