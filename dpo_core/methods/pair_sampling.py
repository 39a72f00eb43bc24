"""Makes preference pairs from scored samples of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.generation.config import SamplingConfig


class PairSamplingConfig(Config):
    """How pairs are made for a recipe that has only prompts."""

    samples_per_prompt: int = Field(4, ge=2)
    """Completions drawn from the reference for each training prompt."""
    pairing: Literal["all", "extremes"] = "all"
    """all: every two samples whose rewards differ; extremes: the best and the worst."""
    pairs_per_prompt: int = Field(1, ge=1, exclude_if=lambda count: count == 1)
    """With extremes: so many pairs, the second of the second best and the second worst sample."""
    min_gap: float = Field(0.0, ge=0)
    """Samples whose rewards differ by at most this are a tie and make no pair."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""

    @model_validator(mode="after")
    def _extremes_are_counted(self) -> "PairSamplingConfig":
        if self.pairing == "all" and self.pairs_per_prompt != 1:
            raise ValueError("pairs_per_prompt has no effect with pairing: all. Set pairing to extremes")
        return self

    @property
    def most_pairs(self) -> int:
        """The largest number of pairs of a prompt."""
        samples = self.samples_per_prompt
        if self.pairing == "all":
            return samples * (samples - 1) // 2
        return min(self.pairs_per_prompt, samples // 2)


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
    most = min(config.pairs_per_prompt, len(ranked) // 2)
    extremes = [(ranked[place], ranked[-1 - place]) for place in range(most)]
    candidates = list(combinations(ranked, 2)) if config.pairing == "all" else extremes
    pairs: dict[tuple[str, str], tuple[ScoredSample, ScoredSample]] = {}
    ties = 0
    for better, worse in candidates:
        if better.reward - worse.reward <= config.min_gap or better.text.strip() == worse.text.strip():
            ties += 1
        else:
            pairs.setdefault((better.text, worse.text), (better, worse))
    return list(pairs.values()), ties
