"""Online and iterative DPO: sample, label, train on the pairs, again.

Each round draws several completions of each prompt from the policy as it is, takes the best and the worst by
the scorer, and makes preference steps on them. Online DPO (Guo et al. 2024, arXiv 2402.04792): many rounds,
one step each, a fixed reference. Iterative DPO (Xu et al. 2024, 2404.10719): few rounds of many episodes and
steps, each with the policy that the round began with as its reference.

Shapes: P pairs of a micro-batch, S = 2P completions (chosen and rejected in turn).
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_core.methods.job import Job
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.models.dropout import set_training
from dpo_core.models.load import load_model
from dpo_core.objectives import PairLogps, Totals, combine, get, pair_metrics
from dpo_core.scoring import flops as cost
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.trainers.common import Export, start
from dpo_core.trainers.online.grpo_math import flat_groups
from dpo_core.trainers.online.loop import OnlineTrainer, export_trained, move
from dpo_core.trainers.online.rollouts import Episode, Rollout, micro_batches, rows_of
from dpo_core.trainers.online.sampler import RolloutContext, rollout_context


@dataclass(frozen=True)
class Pair:
    """The best and the worst completion of a prompt."""

    chosen: "Candidate"
    rejected: "Candidate"
    weight: float
    """1, or 0 for a tie: ties keep their place, so that every rank has as many pairs."""

    @property
    def place(self) -> tuple[int, int]:
        return 0, self.chosen.episode.group

    def __len__(self) -> int:
        return len(self.chosen.episode) + len(self.rejected.episode)


class OnlineDpoTrainer(OnlineTrainer[Pair]):
    """The loop with preference steps; `micro_batch_size` counts pairs in the updates."""

    def __init__(self, policy: Any, reference: Any, context: RolloutContext, config: OnlineDpoConfig) -> None:
        self.config, self.term = config, config.term
        scale = get(config.objective).reward_scale
        self.beta = self.term.parameters[scale] if scale else 1.0
        super().__init__(policy, reference, context, config)

    @property
    def temperature(self) -> float:
        """The policy that a preference loss is about is that at temperature 1, however samples are drawn."""
        return 1.0

    def micro_batch_count(self, episodes: int) -> int:
        return episodes // (self.config.samples_per_prompt * self.config.micro_batch_size)

    def read_together(self, episodes: list[Episode], iteration: int) -> list[list[Episode]]:
        """Neighbours in length: a loss on pairs has no ratio to what was read here."""
        return micro_batches(episodes, self.config.micro_batch_size)

    def prepare(self, rollouts: list[Rollout]) -> list[Pair]:
        """The best against the worst of each prompt."""
        groups: dict[int, list[Candidate]] = {}
        for rollout in rollouts:
            rewards, references = self.rewards(rollout).tolist(), rollout.ref_logps_BR.sum(1).tolist()
            for episode, reward, reference in zip(rollout.episodes, rewards, references, strict=True):
                groups.setdefault(episode.group, []).append(Candidate(episode, reward, reference))
        extreme = [extremes(groups[group]) for group in sorted(groups)]
        return [Pair(better, worse, float(not self._tied(better, worse))) for better, worse in extreme]

    def _tied(self, better: "Candidate", worse: "Candidate") -> bool:
        same = better.episode.sequence.completion == worse.episode.sequence.completion
        return same or better.reward - worse.reward <= self.config.min_gap

    def optimise(self, minibatch: list[list[Pair]]) -> dict[str, float]:
        """One optimiser step; the loss is the mean over the global minibatch's pairs that are no ties."""
        mine = [pair for micro in minibatch for pair in micro if pair.weight]
        counts = [len(mine), sum(len(pair.chosen.episode.sequence.completion) for pair in mine)]
        pairs, tokens = self.engine.all_sum(torch.tensor(counts).double()).tolist()
        totals = Totals(pairs=max(pairs, 1.0), chosen_tokens=tokens, prompt_tokens=0.0)
        sums: dict[str, float] = {}
        norm = 0.0
        set_training(self.module)
        for micro in minibatch:
            weight_P = torch.tensor([pair.weight for pair in micro], device=self.engine.device)
            losses_P, numbers = self._losses(micro, totals)
            self.engine.backward((losses_P * weight_P).sum(), max(pairs, 1.0))
            norm = self.engine.step() or norm
            for name, value_P in {"loss": losses_P.detach(), **numbers}.items():
                sums[name] = sums.get(name, 0.0) + float((value_P * weight_P).sum())
        means = {name: value / max(pairs, 1.0) for name, value in self.sum_over_ranks(sums).items()}
        return means | {"pairs": pairs, "grad_norm": norm}

    def _losses(self, micro: list[Pair], totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
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

    def facts(self, rollouts: list[Rollout]) -> dict[str, float]:
        scores_N = torch.cat([r.of("score") for r in rollouts])
        groups_N = torch.cat([r.of("group") for r in rollouts])
        flat = flat_groups(scores_N, groups_N)
        groups = self.config.episodes / self.config.samples_per_prompt
        return {"frac_reward_zero_std": float(self.engine.all_sum(torch.tensor(float(flat)))) / groups}

    def update_reference(self) -> None:
        if self.config.renew_reference:
            move(self.reference, self.module, 1.0)
        super().update_reference()

    def update_flops(self, rollouts: list[Rollout]) -> float:
        # Two of each prompt's samples are trained on.
        share = 2 / self.config.samples_per_prompt
        return self.config.epochs * share * self._passes(rollouts, cost.training)

    def state(self) -> dict[str, Any]:
        moving = self.config.renew_reference
        return super().state() | ({"reference": self.reference.state_dict()} if moving else {})


@dataclass(frozen=True)
class Candidate:
    """A sampled completion, what it is worth, and its log-prob under the reference."""

    episode: Episode
    reward: float
    ref_logp: float


def extremes(candidates: Seq[Candidate]) -> tuple[Candidate, Candidate]:
    """The best and the worst of a prompt's candidates; of equals the one drawn first is the better."""
    ranked = sorted(candidates, key=lambda c: (-c.reward, c.episode.sample))
    return ranked[0], ranked[-1]


def build(job: Job, config: OnlineDpoConfig) -> tuple[Any, Export]:
    """See `registry.build`."""
    policy, tokenizer, tokenise = start(job, config)
    context = rollout_context(job, tokenise, config.engine.precision)
    trainer = OnlineDpoTrainer(policy, load_model(Path(str(job.reference))), context, config)
    return trainer, export_trained(policy, tokenizer, job)
