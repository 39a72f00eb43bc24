"""PPO for RLHF: sample, score, penalise the KL to the reference, estimate advantages, update.

The mathematics is in `ppo_math`; this file is the loop. Shapes: B episodes, R response tokens of the
longest, N of all together. Sampling and scoring use one temperature and no truncation of the distribution.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dpo_core import ppo_math
from dpo_core.batches import Order
from dpo_core.config import Config
from dpo_core.engine import Engine, MetricsFile, Stopped
from dpo_core.engine_config import EngineConfig, OptimConfig
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.generate import SamplingConfig, sample, seed_for
from dpo_core.layout import Document, PaddedRows, pad
from dpo_core.logprobs import autocast
from dpo_core.scores import hidden_of, token_scores
from dpo_core.tokens import Sequence

log = logging.getLogger(__name__)

# Scores of completions: token sequences and the prompt texts they answer, in order.
Scorer = Callable[[Seq[Sequence], Seq[str]], list[float]]


class PpoConfig(Config):
    """The PPO baseline."""

    enabled: bool = True
    """False: no baseline; the page says so."""
    iterations: int = Field(8, ge=1)
    """Rounds of sampling and updating."""
    episodes: int = Field(64, ge=2)
    """Completions sampled in each round, over all ranks."""
    epochs: int = Field(2, ge=1)
    """Passes over each round's episodes."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps in each pass."""
    micro_batch_size: int = Field(16, ge=1)
    """Episodes in one forward pass on one rank."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the per-token KL penalty in the reward."""
    target_kl: float | None = Field(None, gt=0)
    """Steer kl_coef towards this KL in nats per response; empty keeps it fixed."""
    kl_horizon: float = Field(10_000.0, gt=0)
    """Episodes over which the steering acts."""
    clip: float = Field(0.2, gt=0)
    """Clip range of the probability ratio."""
    value_clip: float = Field(0.2, gt=0)
    """Clip range of the value update."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a completion that does not end; empty: no penalty."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5, epsilon=1e-5, warmup_fraction=0.0)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig(save_every=2)
    """Precision, ZeRO stage, ranks; `save_every` counts rounds."""

    @model_validator(mode="after")
    def _episodes_divide(self) -> "PpoConfig":
        if self.engine.zero_stage == 3:
            raise ValueError("PPO samples from the policy, which ZeRO 3 has cut up: use zero_stage 0 to 2")
        for name in ("gradient_checkpointing", "compile"):
            if getattr(self.engine, name):
                raise ValueError(f"engine.{name} is not read by PPO: leave it out")
        share = self.minibatches * self.micro_batch_size * self.engine.processes
        if self.episodes % share:
            raise ValueError(
                f"episodes {self.episodes} is not a multiple of minibatches x micro_batch_size x processes "
                f"= {share}"
            )
        return self


class ActorCritic(nn.Module):
    """A policy with a value head on its trunk; the head starts at zero (Ziegler et al. 2019)."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, rows: PaddedRows, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and values (B,R) of response tokens; a value is of the state that chooses its token."""
        hidden_NH, logps_BR = response_logps(self.policy, rows, temperature)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            values_N = self.value_head(hidden_NH.float()).squeeze(-1)
        return logps_BR, rows.table(values_N)


def response_logps(model: nn.Module, rows: PaddedRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Hidden states (N,H) that choose the response tokens, and the tokens' log-probs (B,R)."""
    hidden_NH = hidden_of(model, rows)[rows.predicts_N]
    logps_N = token_scores(model, hidden_NH, rows.targets_N, temperature=temperature)["logps"]
    return hidden_NH, rows.table(logps_N)


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of finished episodes; response-aligned tensors are (B,R), right-padded."""

    rows: PaddedRows
    mask_BR: Tensor
    logps_BR: Tensor
    ref_logps_BR: Tensor
    values_BR: Tensor
    scores_B: Tensor
    ended_B: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor


class PpoTrainer:
    """The loop over rounds.

    Args:
        policy: starts as a copy of the reference.
        reference: frozen.
        prompts: (ids, text) of training prompts.
        scorer: the reward of finished completions.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        prompts: Seq[tuple[tuple[int, ...], str]],
        config: PpoConfig,
        sampling: SamplingConfig,
        *,
        scorer: Scorer,
        eos_id: int,
        seed: int,
        work: Path,
    ) -> None:
        if not prompts:
            raise StageFailed("there are no prompts to sample from", "Look at what the data gate dropped")
        world = torch.distributed.get_world_size()
        if config.episodes % (config.minibatches * config.micro_batch_size * world):
            raise RecipeError(
                f"{config.episodes} episodes cannot be split over {world} ranks in these minibatches",
                "Choose a multiple of minibatches x micro_batch_size x ranks",
            )
        self.config, self.sampling, self.prompts = config, sampling, prompts
        self.scorer, self.eos_id, self.seed, self.work = scorer, eos_id, seed, work
        self.reference = reference.eval().requires_grad_(False)
        self.micro_per_step = config.episodes // (config.minibatches * config.micro_batch_size * world)
        self.module = ActorCritic(policy)
        self.engine = Engine(
            self.module,
            config.optim,
            config.engine,
            total_steps=config.iterations * config.epochs * config.minibatches,
            micro_batches=self.micro_per_step,
            work=work,
        )
        self.reference.to(self.engine.device)
        self.order = Order(len(prompts), seed)
        self.kl = ppo_math.AdaptiveKL(config.kl_coef, config.target_kl or 1.0, config.kl_horizon)

    def train(self) -> dict[str, float]:
        """Run to the last round, from the newest checkpoint if there is one. Returns its metrics.

        Raises:
            Stopped: SIGTERM came; the state was saved.
        """
        state = self.engine.load_latest()
        done = int(state["step"]) if state else 0
        last: dict[str, float] = dict(state["metrics"]) if state else {}
        if state:
            self.kl.load_state_dict(state["kl"])
        rank0 = self.engine.rank == 0
        metrics = MetricsFile(self.work / "metrics.jsonl", resume_after=done) if rank0 else None
        for iteration in range(done, self.config.iterations):
            last = self._round(iteration)
            if metrics:
                metrics.write(iteration + 1, last)
            stop = self.engine.stop_requested()
            final = iteration + 1 == self.config.iterations
            if stop or final or (iteration + 1) % self.config.engine.save_every == 0:
                self.engine.save(iteration + 1, {"metrics": last, "kl": self.kl.state_dict()})
            if stop and not final:
                raise Stopped(self.engine.told)
        return last

    def _round(self, iteration: int) -> dict[str, float]:
        start = time.perf_counter()
        rate = self.engine.learning_rate
        rollouts = self._advantages(self._rollouts(iteration))
        facts = self._objective_metrics(rollouts)
        steps = [
            self._optimise(minibatch)
            for epoch in range(self.config.epochs)
            for minibatch in self._minibatches(rollouts, iteration, epoch)
        ]
        means = {name: float(np.mean([s[name] for s in steps])) for name in steps[0]}
        if self.config.target_kl is not None:
            self.kl.update(facts["objective/kl"], self.config.episodes)
        tokens = sum(int(r.rows.attention_ST.sum()) + len(r.mask_BR) for r in rollouts) * self.engine.world
        seconds = time.perf_counter() - start
        return {
            **facts,
            **means,
            # The first step of a round has the policy that sampled: any ratio but 1 is a fault.
            "val/ratio_first": steps[0]["val/ratio"],
            "learning_rate": rate,
            "episode": float((iteration + 1) * self.config.episodes),
            "num_tokens": float(tokens * (self.config.epochs + 1)),
            "seconds_per_step": seconds,
        }

    # Rollouts ----------------------------------------------------------------------------------------------

    def _rollouts(self, iteration: int) -> list[Rollout]:
        """This rank's episodes, in micro-batches of neighbours in length."""
        order = self.order.batch(iteration, self.config.episodes)[self.engine.rank :: self.engine.world]
        chosen = [self.prompts[i] for i in order]
        self.module.eval()
        drawn = sample(
            self.module.policy,
            [ids for ids, _ in chosen],
            self.sampling,
            eos_id=self.eos_id,
            seed=seed_for(self.seed, "ppo", iteration, self.engine.rank),
        )
        episodes = [
            (Sequence(ids, completion.ids), text, completion.ended)
            for (ids, text), completion in zip(chosen, drawn, strict=True)
        ]
        episodes.sort(key=lambda e: len(e[0]))
        size = self.config.micro_batch_size
        return [self._score(episodes[i : i + size]) for i in range(0, len(episodes), size)]

    @torch.no_grad()
    def _score(self, episodes: list[tuple[Sequence, str, bool]]) -> Rollout:
        """Log-probs, reference log-probs, values and rewards of one micro-batch.

        The same rows are later trained on together, so that the first ratio is exactly 1.
        """
        device = self.engine.device
        sequences = [s for s, _, _ in episodes]
        rows = pad([Document(s.prompt, (s.completion,)) for s in sequences]).to(device)
        mask_BR = torch.arange(int(rows.lengths_S.max()), device=device) < rows.lengths_S[:, None]
        with autocast(self.config.engine.precision, device):
            logps_BR, values_BR = self.module(rows, self.sampling.temperature)
            _, ref_logps_BR = response_logps(self.reference, rows, self.sampling.temperature)
        scores_B = torch.tensor(self.scorer(sequences, [t for _, t, _ in episodes]), device=device).float()
        empty = torch.zeros_like(mask_BR, dtype=torch.float32)
        return Rollout(
            rows=rows,
            mask_BR=mask_BR,
            logps_BR=logps_BR,
            ref_logps_BR=ref_logps_BR,
            values_BR=values_BR,
            scores_B=scores_B,
            ended_B=torch.tensor([e for _, _, e in episodes], device=device),
            advantages_BR=empty,
            returns_BR=empty,
        )

    def _advantages(self, rollouts: list[Rollout]) -> list[Rollout]:
        """GAE of each micro-batch, then whitening over the global batch."""
        estimated = []
        for rollout in rollouts:
            scores_B = rollout.scores_B
            if self.config.missing_eos_penalty is not None:
                scores_B = ppo_math.eos_penalty(scores_B, rollout.ended_B, self.config.missing_eos_penalty)
            rewards_BR = ppo_math.per_token_rewards(
                rollout.logps_BR, rollout.ref_logps_BR, rollout.mask_BR, scores_B, self.kl.value
            )
            advantages_BR, returns_BR = ppo_math.gae(
                rewards_BR, rollout.values_BR, rollout.mask_BR, self.config.gamma, self.config.lam
            )
            estimated.append(replace(rollout, advantages_BR=advantages_BR, returns_BR=returns_BR))
        flat_N = torch.cat([r.advantages_BR[r.mask_BR] for r in estimated])
        white_N = ppo_math.masked_whiten(
            flat_N[None], torch.ones_like(flat_N[None], dtype=torch.bool), reduce=self.engine.all_sum
        )[0]
        whitened, start = [], 0
        for rollout in estimated:
            count = int(rollout.mask_BR.sum())
            advantages_BR = torch.zeros_like(rollout.advantages_BR)
            advantages_BR[rollout.mask_BR] = white_N[start : start + count]
            whitened.append(replace(rollout, advantages_BR=advantages_BR))
            start += count
        return whitened

    # Updates -----------------------------------------------------------------------------------------------

    def _minibatches(self, rollouts: list[Rollout], iteration: int, epoch: int) -> list[list[Rollout]]:
        """Micro-batches dealt into minibatches; a fresh shuffle each pass but the first."""
        order = np.arange(len(rollouts))
        if epoch:
            order = np.random.default_rng((self.seed, iteration, epoch)).permutation(order)
        size = self.micro_per_step
        return [[rollouts[i] for i in order[s : s + size]] for s in range(0, len(order), size)]

    def _optimise(self, minibatch: list[Rollout]) -> dict[str, float]:
        """One optimiser step; the loss is the mean over the response tokens of the global minibatch."""
        total = float(self.engine.all_sum(torch.tensor(float(sum(int(r.mask_BR.sum()) for r in minibatch)))))
        sums: dict[str, float] = {}
        norm: float | None = None
        self.module.train()
        for rollout in minibatch:
            with autocast(self.config.engine.precision, self.engine.device):
                logps_BR, values_BR = self.module(rollout.rows, self.sampling.temperature)
            policy, policy_stats = ppo_math.policy_loss(
                logps_BR,
                rollout.logps_BR,
                rollout.advantages_BR,
                rollout.mask_BR,
                clip=self.config.clip,
                n_tokens=1.0,  # the sum: the mean is over the global minibatch, taken by the engine
            )
            value, value_stats = ppo_math.value_loss(
                values_BR,
                rollout.values_BR,
                rollout.returns_BR,
                rollout.mask_BR,
                clip=self.config.value_clip,
                n_tokens=1.0,
            )
            self.engine.backward(policy + self.config.value_coef * value, total)
            norm = self.engine.step()
            share = float(rollout.mask_BR.sum()) / total
            numbers = {
                "loss/policy_avg": float(policy.detach()) / total,
                "loss/value_avg": float(value.detach()) / total,
                **{k: float(v) * share for k, v in {**policy_stats, **value_stats}.items()},
            }
            for name, number in numbers.items():
                sums[name] = sums.get(name, 0.0) + number
        names = sorted(sums)
        reduced = self.engine.all_sum(torch.tensor([sums[n] for n in names])).tolist()
        return {**dict(zip(names, reduced, strict=True)), "grad_norm": norm or 0.0}

    def _objective_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """What the round was worth, as means over its episodes on all ranks."""
        kl_B = torch.cat([(r.logps_BR - r.ref_logps_BR).sum(1) for r in rollouts])
        scores_B = torch.cat([r.scores_B for r in rollouts])
        entropy_B = torch.cat([-(r.logps_BR.sum(1)) for r in rollouts])
        lengths_B = torch.cat([r.mask_BR.sum(1) for r in rollouts]).float()
        ended_B = torch.cat([r.ended_B for r in rollouts]).float()
        sums = torch.stack([x.sum() for x in (kl_B, scores_B, entropy_B, lengths_B, ended_B)])
        kl, scores, entropy, length, ended = (self.engine.all_sum(sums) / self.config.episodes).tolist()
        return {
            "objective/kl": kl,
            "objective/scores": scores,
            "objective/entropy": entropy,
            "objective/non_score_reward": -self.kl.value * kl,
            "objective/rlhf_reward": scores - self.kl.value * kl,
            "objective/kl_coef": self.kl.value,
            "completions/mean_length": length,
            "val/num_eos_tokens": ended,
        }
