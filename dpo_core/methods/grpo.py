"""GRPO with its corrections, and RLOO: several samples of each prompt are one another's baseline; no critic.

The arithmetic is in `grpo_math`, the loop in `loop`. Shapes: B episodes, T response tokens of the longest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dpo_core.methods.build import start
from dpo_core.methods.estimate import Inputs, Work, rounds
from dpo_core.methods.job import Job
from dpo_core.methods.method import ROUNDS, Export, Method
from dpo_core.methods.online import grpo_math, ppo_math
from dpo_core.methods.online.grpo_math import Aggregate, Level, Scale
from dpo_core.methods.online.loop import OnlineTrainer, RoundsConfig, export_trained
from dpo_core.methods.online.rollouts import (
    FromEpisode,
    Rollout,
    leading_mask,
    padded,
    response_logps,
    rows_of,
)
from dpo_core.methods.online.sampler import RolloutContext, rollout_context
from dpo_core.models.dropout import set_training
from dpo_core.models.load import load_model
from dpo_core.scoring.logprobs import autocast


@dataclass(frozen=True)
class Rules:
    """What tells the variants apart."""

    baseline: Literal["group", "leave_one_out"]
    scale: Scale
    level: Level
    aggregate: Aggregate
    clip_low: float
    clip_high: float
    kl_coef: float
    kl_in: Literal["loss", "reward"]
    kl_estimator: ppo_math.KlEstimator
    dynamic_rounds: int = 0


_GRPO = Rules("group", "group", "token", "sequence", 0.2, 0.2, 0.04, "loss", "k3")
VARIANTS: dict[str, Rules] = {
    "grpo": _GRPO,
    "dr_grpo": replace(_GRPO, scale="none", aggregate="constant", kl_coef=0.0),
    "dapo": replace(_GRPO, aggregate="token", clip_high=0.28, kl_coef=0.0, dynamic_rounds=3),
    "gspo": replace(_GRPO, level="mean", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
    "rloo": Rules("leave_one_out", "none", "sum", "sequence", 0.2, 0.2, 0.05, "reward", "k1"),
}
"""Each as its paper defines it; RLOO with the clip of TRL, which is idle on the first step of a round."""


class GrpoConfig(RoundsConfig):
    """A method with a group baseline. Fields that are empty take the variant's own value."""

    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"] = "grpo"
    """grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071) or rloo
    (2402.14740)."""
    group_size: int = Field(8, ge=2)
    """Completions of each prompt in a round."""
    epochs: int = Field(1, ge=1)
    """Passes over each round's episodes."""
    scale: Scale | None = None
    """What centred rewards are divided by: their group's standard deviation, the batch's, or nothing."""
    sample_std: bool = True
    """That deviation divides by G - 1 (TRL); false: by G."""
    level: Level | None = None
    """Whose ratio is clipped: each token's, the response's geometric mean, or the whole response's."""
    aggregate: Aggregate | None = None
    """How token losses become one: mean of response means, mean of tokens, sum over a constant."""
    clip_low: float | None = Field(None, gt=0, lt=1)
    """The ratio is clipped from below at 1 minus this."""
    clip_high: float | None = Field(None, gt=0)
    """And from above at 1 plus this."""
    kl_coef: float | None = Field(None, ge=0)
    """Weight of the KL to the reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """loss: per token, with gradient, as GRPO has it; on the policy's own samples the gradient of k3 is that
    of the forward KL(reference‖policy). reward: subtracted from the score, as RLOO has it; its optimum is
    that of the reverse KL, which DPO and PPO have too."""
    kl_estimator: ppo_math.KlEstimator | None = None
    """Estimator of that KL."""
    dynamic_rounds: int | None = Field(None, ge=0)
    """DAPO's dynamic sampling: how often groups that all score the same are replaced by others."""
    mask_truncated: bool = False
    """DAPO's overlong filtering: completions that were cut teach nothing."""
    soft_overlong: int | None = Field(None, ge=1)
    """DAPO's soft punishment: over so many tokens before max_new_tokens the reward falls to one less."""

    @property
    def samples_each(self) -> int:
        return self.group_size

    @property
    def redraws(self) -> int:
        return self.rules.dynamic_rounds

    @property
    def rules(self) -> Rules:
        """The variant with what this config changes."""
        given = {name: getattr(self, name) for name in Rules.__dataclass_fields__ if hasattr(self, name)}
        return replace(VARIANTS[self.variant], **{k: v for k, v in given.items() if v is not None})

    @model_validator(mode="after")
    def _is_read(self) -> "GrpoConfig":
        leave_one_out = VARIANTS[self.variant].baseline == "leave_one_out"
        if leave_one_out and self.scale not in (None, "none"):
            raise ValueError("rloo's advantages are not scaled: leave scale out")
        if not self.sample_std and self.rules.scale != "group":
            raise ValueError("sample_std is read only where scale is group")
        if self.rules.level != "token" and self.rules.aggregate != "sequence":
            raise ValueError("one ratio for the whole response goes with aggregate sequence")
        return self


@dataclass(frozen=True)
class Judged(FromEpisode):
    """An episode with its advantage."""

    logps_T: Tensor
    """Of the policy that sampled."""
    ref_logps_T: Tensor
    advantage: Tensor
    learnt: bool
    """False: it was cut off, and `mask_truncated` leaves it out."""


class GrpoTrainer(OnlineTrainer[Judged]):
    """The loop with a group baseline; every group is whole on one rank, and its members are dealt apart."""

    def __init__(self, policy: Any, reference: Any, around: RolloutContext, config: GrpoConfig) -> None:
        self.config, self.rules = config, config.rules
        super().__init__(policy, reference, around, config)

    def prepare(self, rollouts: list[Rollout]) -> list[Judged]:
        """Advantages of the round, each against its whole group."""
        rewards_N = torch.cat([self._paid(r) for r in rollouts])
        groups_N = torch.cat([r.of("group") for r in rollouts])
        if self.rules.baseline == "leave_one_out":
            advantages_N = grpo_math.leave_one_out(rewards_N, groups_N)
        else:
            advantages_N = grpo_math.group_advantages(
                rewards_N, groups_N, self.rules.scale, self._batch_std(rewards_N), self.config.sample_std
            )
        parts = advantages_N.split([len(r.episodes) for r in rollouts])
        return [
            Judged(
                episode,
                rollout.logps_BR[i, : len(episode.sequence.completion)],
                rollout.ref_logps_BR[i, : len(episode.sequence.completion)],
                advantages_B[i],
                episode.ended or not self.config.mask_truncated,
            )
            for rollout, advantages_B in zip(rollouts, parts, strict=True)
            for i, episode in enumerate(rollout.episodes)
        ]

    def _paid(self, rollout: Rollout) -> Tensor:
        """Rewards (B,): scores, minus what is charged in the reward."""
        rewards_B = self.rewards(rollout)
        if self.config.soft_overlong:
            longest = self.around.sampling.max_new_tokens
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

    def optimise(self, minibatch: list[list[Judged]]) -> dict[str, float]:
        """One optimiser step; see `grpo_math.denominator` for what the loss is a mean over."""
        mine = [judged for micro in minibatch for judged in micro]
        learnt = sum(len(judged.logps_T) for judged in mine if judged.learnt)
        counts = torch.tensor([len(mine), learnt], dtype=torch.float64)
        responses, tokens = self.engine.all_sum(counts).tolist()
        longest = self.around.sampling.max_new_tokens
        total = grpo_math.denominator(self.rules.aggregate, responses, tokens, longest)
        sums: dict[str, float] = {}
        norm = 0.0
        set_training(self.module)
        for micro in minibatch:
            loss, numbers = self._losses(micro)
            self.engine.backward(loss, total)
            norm = self.engine.step() or norm
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        reduced = self.over_ranks(sums)
        by_tokens = {name: value / max(tokens, 1.0) for name, value in reduced.items() if name not in _SUMMED}
        return by_tokens | {name: reduced[name] / total for name in _SUMMED} | {"grad_norm": norm}

    def _losses(self, micro: list[Judged]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the loss over a micro-batch, and sums of metrics over its tokens."""
        rules = self.rules
        rows = rows_of([judged.episode for judged in micro], self.engine.device)
        with autocast(self.config.engine.precision, self.engine.device):
            _, logps_BT = response_logps(self.module, rows, self.temperature)
        learnt_B = torch.tensor([judged.learnt for judged in micro], device=self.engine.device)
        mask_BT = leading_mask(rows.lengths_S) & learnt_B[:, None]
        advantages_B = torch.stack([judged.advantage for judged in micro])
        ratio = grpo_math.log_ratios(
            logps_BT, padded([judged.logps_T for judged in micro]), mask_BT, rules.level
        )
        losses, clipped = grpo_math.clipped_losses(ratio, advantages_B, rules.clip_low, rules.clip_high)
        mask = mask_BT if rules.level == "token" else mask_BT.any(1, keepdim=True)
        policy = grpo_math.aggregate(losses, mask, rules.aggregate)
        kl_BT = ppo_math.kl_per_token(
            logps_BT,
            padded([judged.ref_logps_T for judged in micro]),
            leading_mask(rows.lengths_S),
            rules.kl_estimator,
        )
        loss = policy
        if rules.kl_in == "loss" and rules.kl_coef:
            loss = loss + rules.kl_coef * grpo_math.aggregate(kl_BT, mask_BT, rules.aggregate)
        # A ratio of whole responses is that of each of their tokens.
        over_tokens: Callable[[Tensor], Tensor] = lambda x: torch.where(  # noqa: E731
            mask_BT, x.to(torch.float32).expand_as(mask_BT), 0.0
        ).sum()
        up = advantages_B[:, None] > 0
        return loss, {
            "loss": loss,
            "loss/policy_avg": policy,
            "kl": over_tokens(kl_BT),
            "val/ratio": over_tokens(ratio.clamp(max=20.0).exp()),  # as `clipped_losses` bounds it
            "policy/approxkl_avg": over_tokens(0.5 * ratio**2),
            "clip_ratio/low_mean": over_tokens(clipped & ~up),
            "clip_ratio/high_mean": over_tokens(clipped & up),
            "clip_ratio/region_mean": over_tokens(clipped),
        }

    def facts(self, rollouts: list[Rollout]) -> dict[str, float]:
        rewards_N = torch.cat([self._paid(r) for r in rollouts]).double()
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


# Sums that are a part of the loss already; the others are means over the tokens learnt from.
_SUMMED = ("loss", "loss/policy_avg")


def build(job: Job, config: GrpoConfig) -> tuple[Any, Export]:
    """See `Method.build`."""
    policy, tokenizer, tokenise = start(job, config)
    around = rollout_context(job, tokenise, config.engine.precision)
    trainer = GrpoTrainer(policy, load_model(Path(str(job.reference))), around, config)
    return trainer, export_trained(policy, tokenizer, job)


def estimate(config: GrpoConfig, inputs: Inputs) -> Work:
    """See `Method.estimate`."""
    return rounds(config, inputs)


METHOD = Method(
    name="grpo",
    title="Group baselines: GRPO, Dr. GRPO, DAPO, GSPO, RLOO",
    citation="Shao et al. 2024, arXiv 2402.03300; each variant names its own paper",
    settings=GrpoConfig,
    data="prompts",
    build=build,
    estimate=estimate,
    curves=ROUNDS,
    version=2,
    scored=True,
    reference=lambda config: "live",
    total_steps=lambda config, rows: config.iterations,
)
