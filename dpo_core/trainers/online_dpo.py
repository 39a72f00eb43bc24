"""Trains with online and iterative DPO: each round samples completions, scores them and trains on pairs.

A round draws several completions of each prompt from the current policy and pairs the best with the worst by
their scores. Online DPO (Guo et al. 2024, arXiv 2402.04792): many rounds, one step each, a fixed reference.
Iterative DPO (Xu et al. 2024, 2404.10719): few rounds of many episodes and steps; the reference of a round is
the policy that it began with.

Shapes: P pairs of a micro-batch, S = 2P completions (chosen and rejected in turn).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_core.methods.job import Job
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.models.load import load_model
from dpo_core.objectives import PairLogps, Totals, combine, get, pair_metrics
from dpo_core.scoring import flops as cost
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.trainers.common import Export, export_model, move_towards, start
from dpo_core.trainers.online.grpo_math import flat_groups
from dpo_core.trainers.online.loop import OnlineTrainer
from dpo_core.trainers.online.rollouts import Episode, Rollout, micro_batches, rows_of
from dpo_core.trainers.online.sampler import RolloutContext, rollout_context


@dataclass(frozen=True)
class CompletionPair:
    """The best and the worst completion of a prompt."""

    chosen: "ScoredEpisode"
    rejected: "ScoredEpisode"
    weight: float
    """1, or 0 for a tie: ties are kept, so that every rank has the same number of pairs."""

    @property
    def sort_key(self) -> tuple[int, int]:
        return 0, self.chosen.episode.group

    def __len__(self) -> int:
        return len(self.chosen.episode) + len(self.rejected.episode)


class OnlineDpoTrainer(OnlineTrainer[CompletionPair]):
    """Online trainer with a preference objective; `micro_batch_size` counts pairs in the updates."""

    def __init__(self, policy: Any, reference: Any, context: RolloutContext, config: OnlineDpoConfig) -> None:
        self.config, self.term = config, config.term
        scale = get(config.objective).reward_scale
        self.beta = self.term.parameters[scale] if scale else 1.0
        super().__init__(policy, reference, context, config)

    @property
    def temperature(self) -> float:
        """1: preference losses are defined on the policy itself, at whatever temperature it is sampled."""
        return 1.0

    def micro_batch_count(self, episodes: int) -> int:
        return episodes // (self.config.samples_per_prompt * self.config.micro_batch_size)

    def rollout_batches(self, episodes: list[Episode], iteration: int) -> list[list[Episode]]:
        """Episodes of similar length: a loss on pairs has no ratio to the log-probs of the rollout."""
        return micro_batches(episodes, self.config.micro_batch_size)

    def prepare(self, rollouts: list[Rollout]) -> list[CompletionPair]:
        """The pair of the best and the worst completion of each prompt."""
        groups: dict[int, list[ScoredEpisode]] = {}
        for rollout in rollouts:
            scores, ref_logps = self.scores(rollout).tolist(), rollout.ref_logps_BR.sum(1).tolist()
            for episode, score, ref_logp in zip(rollout.episodes, scores, ref_logps, strict=True):
                groups.setdefault(episode.group, []).append(ScoredEpisode(episode, score, ref_logp))
        pairs = [best_and_worst(groups[group]) for group in sorted(groups)]
        return [CompletionPair(best, worst, float(not self._tied(best, worst))) for best, worst in pairs]

    def _tied(self, best: "ScoredEpisode", worst: "ScoredEpisode") -> bool:
        same = best.episode.sequence.completion == worst.episode.sequence.completion
        return same or best.score - worst.score <= self.config.min_gap

    def optimise(self, minibatch: list[list[CompletionPair]]) -> dict[str, float]:
        """One optimiser step; the loss is the mean over the global minibatch's pairs that are not ties."""
        untied = [pair for micro in minibatch for pair in micro if pair.weight]
        counts = [len(untied), sum(len(pair.chosen.episode.sequence.completion) for pair in untied)]
        pairs, tokens = self.engine.all_sum(torch.tensor(counts).double()).tolist()
        totals = Totals(pairs=max(pairs, 1.0), chosen_tokens=tokens, prompt_tokens=0.0)

        def losses(micro: list[CompletionPair]) -> tuple[Tensor, dict[str, Tensor]]:
            weight_P = torch.tensor([pair.weight for pair in micro], device=self.engine.device)
            losses_P, numbers = self._losses(micro, totals)
            values = {"loss": losses_P.detach(), **numbers}
            sums = {name: (value_P * weight_P).sum() for name, value_P in values.items()}
            return (losses_P * weight_P).sum(), sums

        sums, norm = self.update(minibatch, losses, max(pairs, 1.0))
        means = {name: value / max(pairs, 1.0) for name, value in sums.items()}
        return means | {"pairs": pairs, "grad_norm": norm}

    def _losses(self, micro: list[CompletionPair], totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        sides = [side for pair in micro for side in (pair.chosen, pair.rejected)]
        with autocast(self.config.engine.precision, self.engine.device):
            scores = branch_scores(self.module, rows_of([c.episode for c in sides], self.engine.device))
        logps_S = scores.logps_SL.sum(-1)
        ref_S = torch.tensor([c.ref_logp for c in sides], device=self.engine.device)
        logps = PairLogps(
            logps_S[0::2],
            logps_S[1::2],
            ref_S[0::2],
            ref_S[1::2],
            scores.lengths_S[0::2],
            scores.lengths_S[1::2],
            totals=totals,
        )
        per_token = get(self.config.objective).rewards_per_token
        return combine([self.term], logps), pair_metrics(logps, self.beta, per_token=per_token)

    def method_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        scores_N = torch.cat([r.of("score") for r in rollouts])
        groups_N = torch.cat([r.of("group") for r in rollouts])
        flat = flat_groups(scores_N, groups_N)
        groups = self.config.episodes / self.config.samples_per_prompt
        return {"frac_reward_zero_std": float(self.engine.all_sum(torch.tensor(float(flat)))) / groups}

    def update_reference(self) -> None:
        if self.config.renew_reference:
            move_towards(self.reference, self.module, 1.0)
        super().update_reference()

    def update_flops(self, rollouts: list[Rollout]) -> float:
        # Two of each prompt's samples are trained on.
        share = 2 / self.config.samples_per_prompt
        return self.config.epochs * share * self._passes(rollouts, cost.training)

    def state(self) -> dict[str, Any]:
        moving = self.config.renew_reference
        return super().state() | ({"reference": self.reference.state_dict()} if moving else {})


@dataclass(frozen=True)
class ScoredEpisode:
    """A sampled completion with its score and its log-prob under the reference."""

    episode: Episode
    score: float
    ref_logp: float


def best_and_worst(episodes: Sequence[ScoredEpisode]) -> tuple[ScoredEpisode, ScoredEpisode]:
    """The best and the worst completion of a prompt; of equal scores the one drawn first is better."""
    ranked = sorted(episodes, key=lambda e: (-e.score, e.episode.sample))
    return ranked[0], ranked[-1]


def build(job: Job, config: OnlineDpoConfig) -> tuple[Any, Export]:
    policy, tokenizer, tokenise = start(job, config)
    context = rollout_context(job, tokenise, config.engine.precision)
    trainer = OnlineDpoTrainer(policy, load_model(Path(str(job.reference))), context, config)
    return trainer, export_model(policy, tokenizer, job, config)
