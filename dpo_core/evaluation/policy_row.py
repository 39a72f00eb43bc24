"""The metrics of a policy and how reports show them; `summary.summarise_samples` computes them."""

from typing import Annotated, Literal, NamedTuple

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate

VERSION = 3
"""Version of the evaluation: raise it when a metric is added or changed, so that runs measure again."""


class MetricFormat(NamedTuple):
    """How reports show a metric of a policy."""

    label: str
    hint: str
    kind: Literal["number", "share", "gap"] = "number"
    """A share is shown in per cent, a gap with its sign."""
    headline: bool = False
    """Whether runs are compared by it."""
    always: bool = False
    """Whether it is shown, with dashes, even if it was not measured."""


class PolicyRow(Config):
    """The metrics of one policy on the evaluation's prompts, in the order of the reports.

    Intervals are at 95 %, resampled by prompt. Metrics declared here appear on the page and in MLflow.
    """

    name: str
    """A policy of the run, the reference or the champion."""
    reward: Annotated[Estimate, MetricFormat("Reward", "mean score per prompt", headline=True)]
    gain: Annotated[
        Estimate | None,
        MetricFormat("Gain over SFT", "paired difference on the same prompts", "gap", headline=True),
    ] = None
    win_rate: Annotated[
        Estimate | None, MetricFormat("Win rate", "against SFT; a tie counts half", "share", headline=True)
    ] = None
    kl: Annotated[
        Estimate | None,
        MetricFormat(
            "KL (k1), nats", "per sequence, to the reference; unbiased, may be negative", headline=True
        ),
    ] = None
    kl_k3: Annotated[
        Estimate | None, MetricFormat("KL (k3), nats", "the same distance; estimator that is never negative")
    ] = None
    accuracy: Annotated[
        Estimate | None,
        MetricFormat(
            "Preference accuracy", "implicit reward on held-out pairs", "share", headline=True, always=True
        ),
    ] = None
    length: Annotated[Estimate | None, MetricFormat("Length, tokens", "mean completion", headline=True)] = (
        None  # of images by a diffusion model, which have no tokens
    )
    ended: Annotated[
        float | None,
        MetricFormat("Answers that end", "share of completions that are not cut at the most tokens", "share"),
    ] = None
    distinct_1: Annotated[
        float | None, MetricFormat("distinct-1", "share of words that are unique; low is repetitive")
    ] = None
    distinct_2: Annotated[
        float | None, MetricFormat("distinct-2", "share of word pairs that are unique; low is repetitive")
    ] = None
    self_bleu: Annotated[
        Estimate | None,
        MetricFormat("Self-BLEU", "against other completions of the prompt; high is repetitive"),
    ] = None
    entropy: Annotated[
        float | None, MetricFormat("Entropy, nats", "mean per token, of the tokens that were sampled")
    ] = None
    predictive_entropy: Annotated[
        Estimate | None, MetricFormat("Predictive entropy, nats", "mean per token, exact over the vocabulary")
    ] = None

    @classmethod
    def shown(cls) -> dict[str, MetricFormat]:
        """How each metric is shown, by its name."""
        fields = cls.model_fields.items()
        return {
            name: shown
            for name, field in fields
            for shown in field.metadata
            if isinstance(shown, MetricFormat)
        }

    def values(self) -> dict[str, float]:
        """The values of the metrics that were measured."""
        measured = ((name, getattr(self, name)) for name in self.shown())
        return {
            name: float(value.value if isinstance(value, Estimate) else value)
            for name, value in measured
            if value is not None
        }
