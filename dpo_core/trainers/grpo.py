"""Trains with group baselines instead of a critic (GRPO and its variants, RLOO).

The arithmetic is in `grpo_math`, the loop in `loop`. Shapes: B episodes, R response tokens of the longest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_core.methods.grpo import GrpoConfig
from dpo_core.methods.job import Job
from dpo_core.models.load import load_model
from dpo_core.scoring.autocast import autocast
from dpo_core.trainers.common import Export, export_model, start
from dpo_core.trainers.online import grpo_math, ppo_math
from dpo_core.trainers.online.loop import OnlineTrainer
from dpo_core.trainers.online.rollouts import (
    EpisodeItem,
    Rollout,
    guided_logps,
    leading_mask,
    padded,
    response_logps,
    rows_of,
)
from dpo_core.trainers.online.sampler import RolloutContext, rollout_context


@dataclass(frozen=True)
class GrpoItem(EpisodeItem):
    """An episode with its advantage."""

    logps_R: Tensor
    """Log-probs under the policy that sampled."""
    ref_logps_R: Tensor
    advantage: Tensor
    learnt: bool
    """False: it is truncated, and `mask_truncated` leaves it out of the loss."""


class GrpoTrainer(OnlineTrainer[GrpoItem]):
    """Online trainer with a group baseline. A group is on one rank, and spread over the minibatches."""

    def __init__(self, policy: Any, reference: Any, context: RolloutContext, config: GrpoConfig) -> None:
        self.config, self.rules = config, config.rules
        sampling = context.sampling.model_copy(update={"guidance": config.guidance})
        context = replace(context, sampling=sampling)
        super().__init__(policy, reference, context, config)

    @property
    def guidance(self) -> float:
        return self.config.guidance if self.config.score == "guided" else 1.0

    def prepare(self, rollouts: list[Rollout]) -> list[GrpoItem]:
        """Advantages of the round, each relative to its group."""
        rewards_N = torch.cat([self._rewards(r) for r in rollouts])
        groups_N = torch.cat([r.of("group") for r in rollouts])
        if self.rules.baseline == "leave_one_out":
            advantages_N = grpo_math.leave_one_out(rewards_N, groups_N)
        else:
            advantages_N = grpo_math.group_advantages(
                rewards_N, groups_N, self.rules.scale, self._batch_std(rewards_N), self.config.sample_std
            )
        parts = advantages_N.split([len(r.episodes) for r in rollouts])
        return [
            GrpoItem(
                episode,
                rollout.logps_BR[i, : len(episode.sequence.completion)],
                rollout.ref_logps_BR[i, : len(episode.sequence.completion)],
                advantages_B[i],
                episode.ended or not self.config.mask_truncated,
            )
            for rollout, advantages_B in zip(rollouts, parts, strict=True)
            for i, episode in enumerate(rollout.episodes)
        ]

    def _rewards(self, rollout: Rollout) -> Tensor:
        """Rewards (B,): scores minus the penalties for length and, with `kl_in` reward, the KL."""
        rewards_B = self.scores(rollout)
        if self.config.soft_overlong:
            longest = self.context.sampling.max_new_tokens
            rewards_B = rewards_B + grpo_math.soft_overlong(
                rollout.lengths_B, longest, self.config.soft_overlong
            )
        if self.rules.kl_in == "reward":
            kl_BR = ppo_math.kl_per_token(
                rollout.logps_BR, rollout.ref_logps_BR, rollout.mask_BR, self.rules.kl_estimator
            )
            rewards_B = rewards_B - self.rules.kl_coef * kl_BR.sum(1)
        return rewards_B

    def _batch_std(self, rewards_N: Tensor) -> Tensor:
        count = self.config.episodes
        mean = self.engine.all_sum(rewards_N.double().sum()) / count
        return (self.engine.all_sum(((rewards_N.double() - mean) ** 2).sum()) / (count - 1)).sqrt()

    def optimise(self, minibatch: list[list[GrpoItem]]) -> dict[str, float]:
        """One optimiser step; see `grpo_math.denominator` for what the loss is a mean over."""
        items = [item for micro in minibatch for item in micro]
        learnt = sum(len(item.logps_R) for item in items if item.learnt)
        counts = torch.tensor([len(items), learnt], dtype=torch.float64)
        responses, tokens = self.engine.all_sum(counts).tolist()
        longest = self.context.sampling.max_new_tokens
        total = grpo_math.denominator(self.rules.aggregate, responses, tokens, longest)
        reduced, norm = self.update(minibatch, self._losses, total)
        by_tokens = {name: value / max(tokens, 1.0) for name, value in reduced.items() if name not in _SUMMED}
        return by_tokens | {name: reduced[name] / total for name in _SUMMED} | {"grad_norm": norm}

    def _losses(self, micro: list[GrpoItem]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the loss over a micro-batch, and sums of metrics over its tokens."""
        rules = self.rules
        rows = rows_of([item.episode for item in micro], self.engine.device)
        with autocast(self.config.engine.precision, self.engine.device):
            if self.guidance == 1:
                _, logps_BR = response_logps(self.module, rows, self.temperature)
            else:
                logps_BR, _ = guided_logps(
                    self.module,
                    [item.episode for item in micro],
                    self.guidance,
                    temperature=self.temperature,
                    device=self.engine.device,
                )
        learnt_B = torch.tensor([item.learnt for item in micro], device=self.engine.device)
        mask_BR = leading_mask(rows.lengths_S) & learnt_B[:, None]
        advantages_B = torch.stack([item.advantage for item in micro])
        ratio = grpo_math.log_ratios(logps_BR, padded([item.logps_R for item in micro]), mask_BR, rules.level)
        losses, clipped = grpo_math.clipped_losses(ratio, advantages_B, rules.clip_low, rules.clip_high)
        mask = mask_BR if rules.level == "token" else mask_BR.any(1, keepdim=True)
        policy = grpo_math.aggregate(losses, mask, rules.aggregate)
        kl_BR = ppo_math.kl_per_token(
            logps_BR,
            padded([item.ref_logps_R for item in micro]),
            leading_mask(rows.lengths_S),
            rules.kl_estimator,
        )
        loss = policy
        if rules.kl_in == "loss" and rules.kl_coef:
            loss = loss + rules.kl_coef * grpo_math.aggregate(kl_BR, mask_BR, rules.aggregate)
        # The ratio of a response counts for each of its tokens.
        over_tokens: Callable[[Tensor], Tensor] = lambda x: torch.where(  # noqa: E731
            mask_BR, x.to(torch.float32).expand_as(mask_BR), 0.0
        ).sum()
        up = advantages_B[:, None] > 0
        return loss, {
            "loss": loss,
            "loss/policy_avg": policy,
            "kl": over_tokens(kl_BR),
            "val/ratio": over_tokens(ratio.clamp(max=20.0).exp()),  # as `clipped_losses` bounds it
            "policy/approxkl_avg": over_tokens(0.5 * ratio**2),
            "clip_ratio/low_mean": over_tokens(clipped & ~up),
            "clip_ratio/high_mean": over_tokens(clipped & up),
            "clip_ratio/region_mean": over_tokens(clipped),
        }

    def method_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        rewards_N = torch.cat([self._rewards(r) for r in rollouts]).double()
        groups_N = torch.cat([r.of("group") for r in rollouts])
        stds_N = grpo_math.group_stds(rewards_N, groups_N)
        flat = grpo_math.flat_groups(torch.cat([r.of("score") for r in rollouts]), groups_N)
        groups = self.config.episodes / self.config.group_size
        sums = self.engine.all_sum(
            torch.stack([rewards_N.sum(), stds_N.sum(), torch.tensor(float(flat)).double()])
        ).tolist()
        return {
            "reward": sums[0] / self.config.episodes,
            "reward_std": sums[1] / self.config.episodes,
            "frac_reward_zero_std": sums[2] / groups,
        }


# Sums divided as the loss is; the others are means over the tokens learnt from.
_SUMMED = ("loss", "loss/policy_avg")


def build(job: Job, config: GrpoConfig) -> tuple[Any, Export]:
    policy, tokenizer, tokenise = start(job, config)
    context = rollout_context(job, tokenise, config.engine.precision)
    trainer = GrpoTrainer(policy, load_model(Path(str(job.reference))), context, config)
    return trainer, export_model(policy, tokenizer, job, config)
