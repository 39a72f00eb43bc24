"""Trains with PPO for RLHF: a critic beside the policy, per-token KL in the reward, GAE, clipped updates.

The mathematics is in `ppo_math`, the loop in `loop`. Shapes: B episodes, R response tokens of the longest,
V states of the longest: R, or R + 1 if the state after the last token has a value too.

Sources: Ziegler et al. 2019 (arXiv 1909.08593), the N+ implementation details (2403.17031), and for the three
settings that matter most Xu et al. 2024 (2404.10719): advantages whitened over the global batch
(`whiten_advantages`), a large batch (`episodes`), a moving reference (`reference_ema`).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_core.methods.job import Job
from dpo_core.methods.ppo import PpoConfig
from dpo_core.models.dropout import disable_dropout, set_training
from dpo_core.models.load import load_model
from dpo_core.models.reward_model import RewardModel
from dpo_core.rewards.functions import is_reward_model
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import trunk_of
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import PaddedRows, pad
from dpo_core.trainers.common import Export, export_model, start
from dpo_core.trainers.online import ppo_math
from dpo_core.trainers.online.loop import OnlineTrainer
from dpo_core.trainers.online.rollouts import (
    Episode,
    EpisodeItem,
    Rollout,
    leading_mask,
    padded,
    response_logps,
    rows_of,
)
from dpo_core.trainers.online.sampler import RolloutContext, rollout_context
from dpo_core.training.engine import Engine


@dataclass(frozen=True)
class PpoItem(EpisodeItem):
    """An episode with its advantages, values and returns."""

    logps_R: Tensor
    """Log-probs under the policy that sampled."""
    advantages_R: Tensor
    values_V: Tensor
    returns_V: Tensor
    states: int
    """Number of states that have a value; the last may have none."""


class PpoTrainer(OnlineTrainer[PpoItem]):
    """Online trainer with a critic.

    Args:
        critic: predicts the return from every state; see `make_critic`.
    """

    def __init__(
        self, policy: Any, reference: Any, critic: RewardModel, context: RolloutContext, config: PpoConfig
    ) -> None:
        self.config, self.critic = config, critic
        self.later = int(config.score_at == "after_last")
        self.kl = ppo_math.AdaptiveKL(config.kl_coef, config.target_kl or 1.0, config.kl_horizon)
        super().__init__(policy, reference, context, config)

    def companions(self) -> dict[str, Engine]:
        self.critic_engine = self.make_engine(self.critic, self.config.critic_optim)
        return {"critic": self.critic_engine}

    # Estimates -------------------------------------------------------------------------------------------

    def prepare(self, rollouts: list[Rollout]) -> list[PpoItem]:
        """Values, rewards and GAE of every episode; whitening over the global batch."""
        self.critic.eval()
        masks, values = map(list, zip(*(self._values(rollout) for rollout in rollouts), strict=True))
        rewards = [self._rewards(r, states_BV) for r, states_BV in zip(rollouts, masks, strict=True)]
        if self.config.whiten_rewards:
            rewards = self._white(rewards, masks, shift_mean=False)
        advantages, returns = [], []
        for rollout, states_BV, values_BV, rewards_BV in zip(rollouts, masks, values, rewards, strict=True):
            advantages_BV, returns_BV = ppo_math.gae(
                rewards_BV, values_BV, states_BV, self.config.gamma, self.config.lam
            )
            width = rollout.mask_BR.shape[1]
            advantages.append(torch.where(rollout.mask_BR, advantages_BV[:, :width], 0.0))
            returns.append(returns_BV)
        if self.config.whiten_advantages:
            advantages = self._white(advantages, [r.mask_BR for r in rollouts])
        items = []
        for rollout, *tables in zip(rollouts, advantages, values, returns, masks, strict=True):
            for i, episode in enumerate(rollout.episodes):
                tokens = len(episode.sequence.completion)
                advantages_R, values_V, returns_V, states_V = (table_B[i] for table_B in tables)
                items.append(
                    PpoItem(
                        episode,
                        rollout.logps_BR[i, :tokens],
                        advantages_R[:tokens],
                        values_V[: tokens + self.later],
                        returns_V[: tokens + self.later],
                        int(states_V.sum()),
                    )
                )
        return items

    @torch.no_grad()
    def _values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Which states have a value (B,V), and their values."""
        rows = self._critic_rows(rollout.episodes)
        room_B = rollout.lengths_B < self.context.sampling.max_new_tokens
        states_BV = leading_mask(rollout.lengths_B + room_B.long() * self.later, int(rows.lengths_S.max()))
        with autocast(self.config.engine.precision, self.engine.device):
            values_BV = state_values(self.critic, rows)
        return states_BV, torch.where(states_BV, values_BV, 0.0)

    def _critic_rows(self, episodes: Sequence[Episode]) -> PaddedRows:
        """The rows that the critic reads."""
        # The added token is never used as a target; it adds a place for the state after the last token.
        added = (0,) * self.later
        documents = [Document(e.sequence.prompt, (e.sequence.completion + added,)) for e in episodes]
        return pad(documents).to(self.engine.device)

    def _rewards(self, rollout: Rollout, states_BV: Tensor) -> Tensor:
        return ppo_math.per_token_rewards(
            rollout.logps_BR,
            rollout.ref_logps_BR,
            rollout.mask_BR,
            self.scores(rollout),
            self.kl.value,
            estimator=self.config.kl_estimator,
            states_BV=states_BV,
        )

    def _white(
        self, values: Sequence[Tensor], masks: Sequence[Tensor], shift_mean: bool = True
    ) -> list[Tensor]:
        """The values, whitened over the masked positions of all micro-batches of all ranks."""
        flat_N = torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)])
        white_N = ppo_math.masked_whiten(
            flat_N[None],
            torch.ones_like(flat_N[None], dtype=torch.bool),
            shift_mean,
            reduce=self.engine.all_sum,
        )[0]
        parts = white_N.split([int(mask.sum()) for mask in masks])
        return [
            torch.zeros_like(value).masked_scatter(mask, part)
            for value, mask, part in zip(values, masks, parts, strict=True)
        ]

    # Updates ---------------------------------------------------------------------------------------------

    def optimise(self, minibatch: list[list[PpoItem]]) -> dict[str, float]:
        """One step of policy and critic: the losses are means over the response tokens of the global
        minibatch, and over its states."""
        own_tokens = sum(len(e.logps_R) for micro in minibatch for e in micro)
        own_states = sum(e.states for micro in minibatch for e in micro)
        counts = torch.tensor([own_tokens, own_states], dtype=torch.float64)
        tokens, states = self.engine.all_sum(counts).tolist()
        sums: dict[str, float] = {}
        norm = critic_norm = 0.0
        set_training(self.module)
        set_training(self.critic)
        for micro in minibatch:
            policy, stats = self._policy_loss(micro)
            self.engine.backward(policy, tokens)
            norm = self.engine.step() or norm
            value, value_stats = self._value_loss(micro)
            self.critic_engine.backward(value, states)
            critic_norm = self.critic_engine.step() or critic_norm
            # The second moment around 1 can be averaged; variances of micro-batches could not.
            stats["val/ratio_var"] += (stats["val/ratio"] - 1) ** 2
            share = sum(len(e.logps_R) for e in micro) / tokens
            value_share = sum(e.states for e in micro) / states
            numbers = {
                "loss/policy_avg": float(policy.detach()) / tokens,
                "loss/value_avg": float(value.detach()) / states,
                **{k: float(v) * share for k, v in stats.items()},
                **{k: float(v) * value_share for k, v in value_stats.items()},
            }
            for name, number in numbers.items():
                sums[name] = sums.get(name, 0.0) + number
        means = self.sum_over_ranks(sums)
        means["val/ratio_var"] -= (means["val/ratio"] - 1) ** 2
        return means | {"grad_norm": norm, "critic/grad_norm": critic_norm}

    def _policy_loss(self, micro: list[PpoItem]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = rows_of([e.episode for e in micro], self.engine.device)
        with autocast(self.config.engine.precision, self.engine.device):
            _, logps_BR = response_logps(self.module, rows, self.temperature)
        return ppo_math.policy_loss(
            logps_BR,
            padded([e.logps_R for e in micro]),
            padded([e.advantages_R for e in micro]),
            leading_mask(rows.lengths_S),
            clip=self.config.clip,
            n_tokens=1.0,  # the sum: the mean is over the global minibatch, taken by the engine
        )

    def _value_loss(self, micro: list[PpoItem]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self._critic_rows([e.episode for e in micro])
        with autocast(self.config.engine.precision, self.engine.device):
            values_BV = state_values(self.critic, rows)
        counts_B = torch.tensor([e.states for e in micro], device=self.engine.device)
        return ppo_math.value_loss(
            values_BV,
            padded([e.values_V for e in micro]),
            padded([e.returns_V for e in micro]),
            leading_mask(counts_B, values_BV.shape[1]),
            clip=self.config.value_clip,
            n_tokens=1.0,
        )

    # The round -------------------------------------------------------------------------------------------

    def method_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        metrics = {"objective/kl_coef": self.kl.value}
        if self.config.target_kl is not None:
            metrics["objective/kl_target"] = self.config.target_kl
        rewards = sum(float(self._rewards(r, r.mask_BR).sum()) for r in rollouts)
        scores = sum(float(self.scores(r).sum()) for r in rollouts)
        totals = self.engine.all_sum(torch.tensor([rewards, rewards - scores], dtype=torch.float64))
        reward, penalty = (totals / self.config.episodes).tolist()
        return metrics | {"objective/rlhf_reward": reward, "objective/non_score_reward": penalty}

    def end_round(self, iteration: int, metrics: Mapping[str, float]) -> None:
        if self.config.target_kl is not None:
            self.kl.update(metrics["objective/kl"], self.config.episodes)

    def update_flops(self, rollouts: list[Rollout]) -> float:
        critic = self._passes(rollouts, cost.forward, head=False)
        critic += self.config.epochs * self._passes(rollouts, cost.training, head=False)
        return super().update_flops(rollouts) + critic

    def state(self) -> dict[str, Any]:
        return super().state() | {"kl": self.kl.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.kl.load_state_dict(state["kl"])


def make_critic(reference: Any) -> RewardModel:
    """The critic without a reward model: a copy of the reference's trunk with a head of zeros, so that all
    its values start at 0 (Ziegler et al. 2019)."""
    critic = RewardModel(copy.deepcopy(trunk_of(reference)))
    torch.nn.init.zeros_(critic.head.weight)
    return critic


def state_values(critic: RewardModel, rows: PaddedRows) -> Tensor:
    """Values (B,V) of the states in which the response tokens are chosen; 0 after a row's end."""
    values_N = critic.per_token(rows.ids_ST, rows.attention_ST).flatten()[rows.predicts_N]
    return rows.table(values_N)


def build(job: Job, config: PpoConfig) -> tuple[Any, Export]:
    """The critic starts from the reward model, if the reward is one."""
    policy, tokenizer, tokenise = start(job, config)
    context = rollout_context(job, tokenise, config.engine.precision)
    reference = load_model(Path(str(job.reference)))
    source = str(job.reward_source)
    critic = RewardModel.load(source) if is_reward_model(source) else make_critic(reference)
    disable_dropout(critic)
    trainer = PpoTrainer(policy, reference, critic, context, config)
    return trainer, export_model(policy, tokenizer, job, config)
