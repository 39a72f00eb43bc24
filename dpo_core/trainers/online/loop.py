"""The loop over rounds of PPO, GRPO, RLOO and online DPO: sample, score, compute log-probs, update, save.

Samples are drawn from the untruncated distribution, and log-probs are computed at the temperature of
sampling. A round's samples depend on the seed, the round and the number of prompts drawn before, not on the
number of ranks.
"""

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from dpo_core.data.tokens.image_codes import image_codes
from dpo_core.errors import NeedsNewSettings, RecipeError
from dpo_core.methods.rounds import RoundsConfig
from dpo_core.models.dropout import set_training
from dpo_core.scoring import flops as cost
from dpo_core.scoring.kl import k3
from dpo_core.scoring.model_shape import shape_of
from dpo_core.trainers.common import move_towards
from dpo_core.trainers.online import ppo_math
from dpo_core.trainers.online.rollouts import (
    Episode,
    Item,
    Rollout,
    make_rollout,
    micro_batches,
    sampler_gap,
    split_minibatches,
)
from dpo_core.trainers.online.sampler import RolloutContext, Sampler
from dpo_core.training.config import OptimConfig
from dpo_core.training.engine import Engine
from dpo_core.training.loop import StepTrainer
from dpo_core.training.routing import router_balance

log = logging.getLogger(__name__)


class OnlineTrainer(StepTrainer, Generic[Item]):
    """One online training job. A subclass defines what is learnt from a round's rollouts.

    Args:
        policy: the model that is trained; it starts as a copy of the reference or as another model.
        reference: not trained; it moves only with `config.reference_ema`.
    """

    def __init__(self, policy: Any, reference: Any, context: RolloutContext, config: RoundsConfig) -> None:
        self.rounds, self.context, self.total_steps = config, context, config.iterations
        self.reference = reference.eval().requires_grad_(False)
        self.module = policy
        if image_codes(policy.config) and (rules := config.length_rules):
            raise NeedsNewSettings(
                f"{rules[0]} has no effect on images, which all have one length and no end",
                f"Remove {rules[0]}",
            )
        if router_balance(policy) is not None:
            log.warning(
                "training on own samples leaves out the router's auxiliary loss of the model's config"
            )
        self.shape = shape_of(policy)
        self.micro_per_step = self._micro_per_step()
        self.engine = self.make_engine(policy, config.optim, self.companions())
        self.reference.to(self.engine.device)
        self.sampler = Sampler(
            policy,
            context,
            self.engine,
            prompts=config.episodes // config.completions_per_prompt,
            completions_per_prompt=config.completions_per_prompt,
            redraws=config.redraws,
        )

    def _micro_per_step(self) -> int:
        world, config = torch.distributed.get_world_size(), self.rounds
        share = config.minibatches * config.micro_batch_size * world
        least = math.lcm(share, config.completions_per_prompt * world)
        if config.episodes % least:
            raise RecipeError(
                f"episodes is {config.episodes}, but must be a multiple of {config.minibatches} minibatches "
                f"x {config.micro_batch_size} micro_batch_size x {world} ranks, and of "
                f"{config.completions_per_prompt} completions per prompt x {world} ranks",
                f"Make episodes a multiple of {least}",
            )
        return self.micro_batch_count(config.episodes // world) // config.minibatches

    def micro_batch_count(self, episodes: int) -> int:
        """Number of micro-batches of a number of episodes on one rank."""
        return episodes // self.rounds.micro_batch_size

    def make_engine(
        self, module: Any, optim: OptimConfig, companions: Mapping[str, Engine] | None = None
    ) -> Engine:
        """An engine that steps as often as the policy's."""
        config = self.rounds
        return Engine(
            module,
            optim,
            config.engine,
            total_steps=config.iterations * config.epochs * config.minibatches,
            micro_batches=self.micro_per_step,
            work=self.context.work,
            companions=companions,
        )

    # To be defined by a subclass -------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, rollouts: list[Rollout]) -> list[Item]:
        """The items to learn from, the same number on every rank; baselines are over the whole round."""

    @abstractmethod
    def optimise(self, minibatch: list[list[Item]]) -> dict[str, float]:
        """One optimiser step on this rank's micro-batches; returns its metrics over all ranks."""

    def update(
        self,
        minibatch: list[list[Item]],
        losses: Callable[[list[Item]], tuple[Tensor, dict[str, Tensor]]],
        total: float,
    ) -> tuple[dict[str, float], float]:
        """One step of the policy; returns the sums of the metrics over all ranks, and the gradient norm.

        Args:
            losses: the sum of the loss over a micro-batch, and sums of metrics.
            total: what the loss of the global minibatch is divided by.
        """
        sums: dict[str, float] = {}
        norm = 0.0
        set_training(self.module)
        for micro in minibatch:
            loss, numbers = losses(micro)
            self.engine.backward(loss, total)
            norm = self.engine.step() or norm
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        return self.sum_over_ranks(sums), norm

    def sum_over_ranks(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The sum over all ranks of each value."""
        names = sorted(sums)
        return dict(
            zip(names, self.engine.all_sum(torch.tensor([sums[n] for n in names])).tolist(), strict=True)
        )

    def companions(self) -> dict[str, Engine]:
        """Engines beside the policy's, saved and loaded with it."""
        return {}

    @property
    def temperature(self) -> float:
        """Temperature of the log-probs that are learnt from: that of sampling."""
        return self.context.sampling.temperature

    @property
    def guidance(self) -> float:
        """Guidance of the log-probs that are learnt from; 1: those of the policy itself."""
        return 1.0

    def method_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """The method's own metrics of a round, before its updates."""
        return {}

    def end_round(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Called after a round's updates, before a checkpoint is written."""

    def update_flops(self, rollouts: list[Rollout]) -> float:
        """Operations of this rank's updates in a round."""
        return self.rounds.epochs * self._passes(rollouts, cost.training)

    def state(self) -> dict[str, Any]:
        moving = self.rounds.reference_ema is not None
        return {"drawn": self.sampler.drawn} | ({"reference": self.reference.state_dict()} if moving else {})

    def load_state(self, state: dict[str, Any]) -> None:
        self.sampler.drawn = int(state["drawn"])
        if "reference" in state:
            self.reference.load_state_dict(state["reference"])

    # The loop --------------------------------------------------------------------------------------------

    def step(self, iteration: int) -> dict[str, float]:
        start = time.perf_counter()
        rate = self.engine.learning_rate
        episodes, drawn = self.sampler.round()
        rollouts = self._rollouts(self.rollout_batches(episodes, iteration))
        round_metrics = self._round_metrics(rollouts) | self.method_metrics(rollouts)
        items = self.prepare(rollouts)
        steps = [
            self.optimise(minibatch)
            for epoch in range(self.rounds.epochs)
            for minibatch in self.minibatches(items, iteration, epoch)
        ]
        means = {name: float(np.mean([s[name] for s in steps])) for name in steps[0]}
        if "val/ratio" in means:
            # In the first step of a round the policy is the one that sampled, so the ratio must be 1.
            means["val/ratio_first"] = steps[0]["val/ratio"]
        self.update_reference()
        metrics = round_metrics | means
        self.end_round(iteration, metrics)
        return (
            metrics
            | self._costs(drawn, rollouts)
            | {
                "learning_rate": rate,
                "episode": float((iteration + 1) * self.rounds.episodes),
                "seconds_per_step": time.perf_counter() - start,
            }
        )

    def update_reference(self) -> None:
        """Called after a round's updates: moves the reference if `reference_ema` is set."""
        rate = self.rounds.reference_ema
        if rate is not None:
            move_towards(self.reference, self.module, rate)

    # Rollouts --------------------------------------------------------------------------------------------

    def rollout_batches(self, episodes: list[Episode], iteration: int) -> list[list[Episode]]:
        """Micro-batches for the rollouts' log-probs: those of the first pass of training, row for row."""
        return [micro for minibatch in self.minibatches(episodes, iteration, 0) for micro in minibatch]

    def _rollouts(self, micros: list[list[Episode]]) -> list[Rollout]:
        return [
            make_rollout(
                micro,
                self.module,
                self.reference,
                temperature=self.temperature,
                precision=self.rounds.engine.precision,
                device=self.engine.device,
                guidance=self.guidance,
            )
            for micro in micros
        ]

    def scores(self, rollout: Rollout) -> Tensor:
        """Scores (B,), clipped, and with the penalty for completions that did not end."""
        scores_B, config = rollout.of("score"), self.rounds
        if config.score_clip is not None:
            scores_B = scores_B.clamp(-config.score_clip, config.score_clip)
        if config.missing_eos_penalty is None:
            return scores_B
        ended_B = rollout.of("ended").bool()
        return ppo_math.eos_penalty(
            scores_B, ended_B, config.missing_eos_penalty, replace=config.missing_eos == "replace"
        )

    def minibatches(self, items: Sequence[Any], iteration: int, epoch: int) -> list[list[list[Any]]]:
        """The micro-batches of every minibatch of a pass: assigned at random, then sorted by length."""
        shares = split_minibatches(
            items,
            self.rounds.minibatches,
            key=(self.context.seed, iteration, epoch),
            rank=self.engine.rank,
            world=self.engine.world,
        )
        return [micro_batches(share, self.rounds.micro_batch_size) for share in shares]

    # Metrics ---------------------------------------------------------------------------------------------

    def _round_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Metrics of a round of any method, as means over its episodes on all ranks."""

        def over(value: Callable[[Rollout], Tensor]) -> Tensor:
            return torch.cat([value(r) for r in rollouts]).double()

        gaps_N, ratios_N = sampler_gap(rollouts)
        lengths_B = over(lambda r: r.lengths_B)
        sums = {
            "objective/kl": over(lambda r: (r.logps_BR - r.ref_logps_BR).sum(1)),
            "objective/kl_k3": over(lambda r: k3(r.logps_BR, r.ref_logps_BR).sum(1)),
            "objective/scores": over(lambda r: r.of("score")),
            "objective/entropy": over(lambda r: -r.logps_BR.sum(1)),
            "completions/mean_length": lengths_B,
            "val/num_eos_tokens": over(lambda r: r.of("ended")),
        }
        if self.context.sampling.guidance != 1:
            sums["sampling/guided_kl"] = over(
                # Of the sampler's own tokens: an unbiased estimate of KL(guided‖conditional).
                lambda r: (
                    r.sampler_logps_BR - (r.logps_BR if r.conditional_BR is None else r.conditional_BR)
                ).mean(1)
            )
        if self.context.gold:
            sums["objective/gold_scores"] = over(lambda r: r.of("gold"))
        tokens, gap, ratio, *totals = self.engine.all_sum(
            torch.stack([lengths_B.sum(), gaps_N.sum(), ratios_N.sum(), *(x.sum() for x in sums.values())])
        ).tolist()
        means = {name: x / self.rounds.episodes for name, x in zip(sums, totals, strict=True)}
        most = self.engine.all_max(
            torch.stack([lengths_B.max(), -lengths_B.min(), gaps_N.max(), ratios_N.max(), -ratios_N.min()])
        ).tolist()
        return means | {
            # Sampled entropy: minus the log-prob of the policy's own tokens, nats per token.
            "policy/entropy_avg": means["objective/entropy"] * self.rounds.episodes / tokens,
            "completions/max_length": most[0],
            "completions/min_length": -most[1],
            "completions/clipped_ratio": 1 - means["val/num_eos_tokens"],
            "sampling/logp_difference/mean": gap / tokens,
            "sampling/logp_difference/max": most[2],
            "sampling/importance_sampling_ratio/mean": ratio / tokens,
            "sampling/importance_sampling_ratio/max": most[3],
            "sampling/importance_sampling_ratio/min": -most[4],
        }

    def _costs(self, drawn: list[Episode], rollouts: list[Rollout]) -> dict[str, float]:
        """Tokens and operations of a round: sampling, scoring, log-probs of two models, updates."""
        sequences = [e.sequence for e in drawn]
        sampling = cost.sampling(self.shape, [(len(s.prompt), len(s.completion)) for s in sequences])
        logps = 2 * self._passes(rollouts, cost.forward)
        flops = sampling + self.context.scoring_flops(sequences) + logps + self.update_flops(rollouts)
        tokens = sum(len(e.sequence) for r in rollouts for e in r.episodes)
        counted = torch.tensor([flops, tokens * (self.rounds.epochs + 1)], dtype=torch.float64)
        flops, tokens = self.engine.all_sum(counted).tolist()
        return {"flops": flops, "num_tokens": tokens}

    def _passes(self, rollouts: list[Rollout], count: Callable[..., float], head: bool = True) -> float:
        """Operations of one pass over the rollouts' padded rows.

        Args:
            count: `flops.forward` or `flops.training`.
            head: whether the output head runs on the response tokens.
        """
        total = 0.0
        for rollout in rollouts:
            rows, width = rollout.rows.ids_ST.shape
            scored_tokens = len(rollout.rows.targets_N) if head else 0
            total += count(self.shape, rows * width, rows * width**2, scored_tokens)
        return total
