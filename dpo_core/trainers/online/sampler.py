"""Samples the episodes of a round: chooses its prompts, draws completions and scores them.

Its only state is the number of prompts drawn so far: with the seed it determines every completion, for any
number of ranks and after any interruption.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import NeedsNewSettings, StageFailed
from dpo_core.generation.config import SamplingConfig, seed_for
from dpo_core.generation.generate import sample
from dpo_core.methods.job import Job
from dpo_core.rewards.model import Scorer, metadata_of, scorer, scoring_flops_of
from dpo_core.trainers.online.rollouts import Episode
from dpo_core.training.batches import Order
from dpo_core.training.engine import Engine

# A prompt's token ids and its text.
Prompt = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class RolloutContext:
    """Prompts, sampling settings, reward and output folder of a job that trains on its own samples."""

    prompts: Sequence[Prompt]
    """Training prompts."""
    sampling: SamplingConfig
    eos_id: int | Collection[int]
    """Tokens that end a completion."""
    scorer: Scorer
    """The reward of completions."""
    seed: int
    work: Path
    gold: Scorer | None = None
    """A known reward that is logged beside a learned one."""
    scoring_flops: Callable[[Sequence[TokenSequence]], float] = lambda sequences: 0.0
    """Operations of scoring sequences, if the scorer is a model."""


def rollout_context(job: Job, tokenise: Tokenise, precision: str) -> RolloutContext:
    """The context that a job file describes.

    Raises:
        StageFailed: it lacks a reference, sampling settings or a reward; or no prompt is short enough.
    """
    if job.reference is None or job.sampling is None or job.reward_source is None:
        raise StageFailed(
            f"the {job.method} job file lacks a reference, sampling settings or a reward source",
            "Add reference, sampling and reward_source",
        )
    rows, room = read_parquet(job.data), job.sampling.max_new_tokens
    tokens = [(tokenise.prompt_of(row, room), row["prompt"]) for row in rows]
    prompts = [(ids, text) for ids, text in tokens if ids]
    if not prompts:
        raise NeedsNewSettings(
            f"none of the {len(rows)} training prompts leaves room for a completion of {room} tokens",
            "Raise tokens.max_length or tokens.max_prompt_length, or lower sampling.max_new_tokens",
        )
    return RolloutContext(
        prompts=prompts,
        sampling=job.sampling,
        eos_id=tokenise.stop_ids,
        scorer=scorer(job.reward_source, tokenise, precision, metadata=metadata_of(rows)),
        gold=(
            scorer(job.gold_source, tokenise, precision, metadata=metadata_of(rows))
            if job.gold_source
            else None
        ),
        scoring_flops=scoring_flops_of(job.reward_source),
        seed=job.seed,
        work=Path(job.work),
    )


class Sampler:
    """Draws this rank's episodes of every round; the completions of a prompt are all on one rank.

    Args:
        prompts: prompts of a round, over all ranks.
        redraws: how often prompts whose completions all score the same are replaced by the next prompts.
    """

    def __init__(
        self,
        policy: Any,
        context: RolloutContext,
        engine: Engine,
        *,
        prompts: int,
        completions_per_prompt: int,
        redraws: int,
    ) -> None:
        self.policy, self.context, self.engine = policy, context, engine
        self.prompts, self.completions_per_prompt, self.redraws = prompts, completions_per_prompt, redraws
        self.order = Order(len(context.prompts), context.seed)
        self.drawn = 0
        """Prompts drawn so far, over all ranks."""

    def round(self) -> tuple[list[Episode], list[Episode]]:
        """This rank's episodes of the round, and all that were drawn, including replaced ones."""
        drawn = episodes = self._draw()
        for _ in range(self.redraws):
            good = informative(episodes)
            missing = self.prompts // self.engine.world - len(good)
            if not float(self.engine.all_sum(torch.tensor(float(missing)))):
                break
            more = self._draw()
            drawn = drawn + more
            episodes = replaced(episodes, good, more)
        return episodes, drawn

    def _draw(self) -> list[Episode]:
        """Scored episodes of this rank's share of the next prompts."""
        places = range(self.drawn, self.drawn + self.prompts)[self.engine.rank :: self.engine.world]
        self.drawn += self.prompts
        self.policy.eval()
        episodes = draw(
            self.policy,
            [self.context.prompts[self.order.at(place)] for place in places],
            places,
            self.completions_per_prompt,
            self.context.sampling,
            eos_id=self.context.eos_id,
            seed=seed_for(self.context.seed, "online"),
        )
        return scored(episodes, self.context.scorer, self.context.gold)


def draw(
    policy: nn.Module,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    completions_per_prompt: int,
    sampling: SamplingConfig,
    *,
    eos_id: int | Collection[int],
    seed: int,
) -> list[Episode]:
    """Episodes of every prompt, not scored yet.

    Args:
        places: numbers of the prompts among all that the job draws; they seed the sampling.
    """
    each = completions_per_prompt
    drawn = sample(
        policy,
        [ids for ids, _ in prompts for _ in range(each)],
        sampling,
        eos_id=eos_id,
        seed=seed,
        places=[place * each + k for place in places for k in range(each)],
    )
    return [
        Episode(
            TokenSequence(prompts[i // each][0], c.ids),
            prompts[i // each][1],
            i // each,
            c.ended,
            c.logps,
            sample=i % each,
        )
        for i, c in enumerate(drawn)
    ]


def scored(episodes: Sequence[Episode], scorer: Scorer, gold: Scorer | None) -> list[Episode]:
    """The same episodes with their scores."""
    inputs = [e.sequence for e in episodes], [e.prompt for e in episodes]
    scores = scorer(*inputs)
    golds: Sequence[float | None] = gold(*inputs) if gold else [None] * len(scores)
    return [replace(e, score=s, gold=g) for e, s, g in zip(episodes, scores, golds, strict=True)]


def informative(episodes: Sequence[Episode]) -> set[int]:
    """Groups whose scores differ. The others have no advantages; DAPO's dynamic sampling replaces them."""
    scores: dict[int, list[float]] = {}
    for episode in episodes:
        scores.setdefault(episode.group, []).append(episode.score)
    return {group for group, values in scores.items() if np.ptp(values) > 0}


def replaced(episodes: list[Episode], good: set[int], more: list[Episode]) -> list[Episode]:
    """The episodes, with as many uninformative groups as possible replaced by informative ones of `more`."""
    spare = sorted(informative(more))
    uninformative = sorted({e.group for e in episodes} - good)
    swap = dict(zip(spare, uninformative, strict=False))
    removed = set(swap.values())
    remaining = [e for e in episodes if e.group not in removed]
    return remaining + [replace(e, group=swap[e.group]) for e in more if e.group in swap]
