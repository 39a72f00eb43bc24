"""Makes preference pairs from scored samples of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from pydantic import Field

from dpo_core.config import Config
from dpo_core.generation.config import SamplingConfig


class PairSamplingConfig(Config):
    """How pairs are made for a recipe that has only prompts."""

    samples_per_prompt: int = Field(4, ge=2)
    """Completions drawn from the reference for each training prompt."""
    pairing: Literal["all", "extremes"] = "all"
    """all: every two samples whose rewards differ; extremes: the best and the worst."""
    min_gap: float = Field(0.0, ge=0)
    """Samples whose rewards differ by at most this are a tie and make no pair."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""


@dataclass(frozen=True)
class ScoredSample:
    """A sampled completion, its text and its reward."""

    text: str
    ended: bool
    reward: float


def pair_up(
    samples: Sequence[ScoredSample], config: PairSamplingConfig
) -> tuple[list[tuple[ScoredSample, ScoredSample]], int]:
    """(chosen, rejected) pairs of one prompt, and how many candidate pairs were ties.

    A tie is a reward difference of at most `min_gap`, or two equal texts. Each pair of texts is used once.
    """
    ranked = sorted(samples, key=lambda s: -s.reward)
    candidates = list(combinations(ranked, 2)) if config.pairing == "all" else [(ranked[0], ranked[-1])]
    pairs: dict[tuple[str, str], tuple[ScoredSample, ScoredSample]] = {}
    ties = 0
    for better, worse in candidates:
        if better.reward - worse.reward <= config.min_gap or better.text.strip() == worse.text.strip():
            ties += 1
        else:
            pairs.setdefault((better.text, worse.text), (better, worse))
    return list(pairs.values()), ties
