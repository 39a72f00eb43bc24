"""Trains on pairs with the objectives on pairs, with cached reference log-probs or a live reference.

Shapes: B pairs, S = 2B completions (chosen and rejected in turn), L tokens of the longest, E training pairs.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.tokens.sequences import TokenPair, no_rows_left
from dpo_core.errors import RecipeError
from dpo_core.methods.dpo import DpoConfig, reference_of
from dpo_core.methods.job import Job
from dpo_core.models.load import load_model
from dpo_core.objectives import (
    PairLogps,
    Totals,
    combine,
    get,
    pair_metrics,
    wpo_weights,
)
from dpo_core.reference import LogpShard, sequence_key
from dpo_core.scoring import flops as cost
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import BranchScores, branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.flops import keeps_logits
from dpo_core.scoring.model_shape import shape_of
from dpo_core.trainers.common import (
    Export,
    cached_reference,
    checked_at_start,
    export_model,
    move_towards,
    require_reference_values,
    start,
)
from dpo_core.training.loop import PackedTrainer

log = logging.getLogger(__name__)


class DpoTrainer(PackedTrainer[TokenPair]):
    """Trainer whose loss is the mean over the pairs of the global batch of a weighted sum of objectives.

    Args:
        reference: log-probs of every sequence of `examples` under the reference; None if none are read.
        live_reference: the reference model, if `config.needs_live_reference`; it is frozen.
        policy_is_reference: the policy starts as the reference, so the first loss has a known value.

    Raises:
        RecipeError: an objective needs the whole batch in one forward pass, and the batch is split.
    """

    def __init__(  # noqa: PLR0913 - a reference in one of three forms
        self,
        module: nn.Module,
        examples: Sequence[TokenPair],
        config: DpoConfig,
        *,
        reference: LogpShard | None,
        live_reference: nn.Module | None = None,
        policy_is_reference: bool,
        seed: int,
        work: Path,
    ) -> None:
        super().__init__(module, examples, config, seed=seed, work=work)
        self.dpo, self.terms = config, config.terms
        self.extras = frozenset[str]().union(*(o.extras for o in config.objectives))
        first = get(config.objective)
        self.beta = self.terms[0].parameters[first.reward_scale] if first.reward_scale else 1.0
        self.rewards_per_token = first.rewards_per_token
        self.policy_is_reference = policy_is_reference and config.needs_reference
        self.totals: Totals | None = None
        self.live = live_reference if config.needs_live_reference else None
        if self.live is not None:
            self.live.to(self.engine.device).eval().requires_grad_(False)
            self.live_shape = shape_of(self.live)
        elif reference is not None:
            self.reference = self._cached(reference)
        self._require_whole_batches()

    def _require_whole_batches(self) -> None:
        coupled = [o.name for o in self.dpo.objectives if o.batch_coupled]
        parts = self.batches.micro_batches * self.engine.world
        if coupled and parts != 1:
            raise RecipeError(
                f"objective '{coupled[0]}' needs a batch in one forward pass, but it is split into {parts}",
                "Train in one process, and raise pack_tokens (or micro_batch_size) until a batch is one pass",
            )

    def _cached(self, shard: LogpShard) -> dict[str, np.ndarray]:
        """By id: reference log-probs of chosen and rejected, complete and up to the shorter one's length."""
        # Raises for a stale or incomplete cache before training starts.
        keys = [sequence_key(s) for e in self.examples for s in (e.chosen, e.rejected)]
        columns = [shard.sums(keys).astype(np.float32).reshape(-1, 2)]
        if "common" in self.extras:
            shorter = [min(e.chosen.targets, e.rejected.targets) for e in self.examples]
            common = shard.sums(keys, first=np.repeat(shorter, 2))
            columns.append(common.astype(np.float32).reshape(-1, 2))
        values = np.concatenate(columns, axis=1)
        return {e.id: row for e, row in zip(self.examples, values, strict=True)}

    def document(self, example: TokenPair) -> Document:
        return Document.of(example.chosen, example.rejected)

    def length(self, example: TokenPair) -> int:
        return max(len(example.chosen), len(example.rejected))

    def tokens(self, example: TokenPair) -> int:
        return len(example.chosen) + len(example.rejected)

    def weight(self, example: TokenPair) -> float:
        return 1.0

    def begin_step(self, batch: Sequence[TokenPair]) -> None:
        self.totals = Totals(
            pairs=len(batch),
            chosen_tokens=sum(e.chosen.targets for e in batch),
            prompt_tokens=sum(len(e.chosen.prompt) - 1 for e in batch),
        )

    def micro_flops(self, micro: Sequence[TokenPair]) -> float:
        sizes = self.sizes(micro)
        total = self.trained_flops(sizes)
        if "prompt" in self.extras:
            total += self.trained_flops(cost.Sizes(0, 0, sum(len(e.chosen.prompt) - 1 for e in micro)))
        if self.live is not None:
            total += cost.forward(self.live_shape, *sizes)
            # The KL's backward pass needs the reference's distribution, recomputed if the policy's is.
            if "kl" in self.extras and not keeps_logits(round(sizes.scored), self.shape.vocabulary):
                total += cost.forward(self.live_shape, 0, 0, sizes.scored)
        return total

    def losses(self, batch: Sequence[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        logps = self.logps(batch)
        losses_B = combine(self.terms, logps)
        if self.dpo.weighting == "wpo":
            losses_B = losses_B * wpo_weights(logps)
        numbers = pair_metrics(logps, self.beta, per_token=self.rewards_per_token)
        return losses_B.sum(), {name: value_B.sum() for name, value_B in numbers.items()}

    def logps(self, batch: Sequence[TokenPair]) -> PairLogps:
        """Log-probs of both sides of every pair, in one forward pass, and those of the reference."""
        with autocast(self.config.engine.precision, self.engine.device):
            scores = branch_scores(
                self.module,
                self.lay_out(batch),
                reference=self.live,
                kl="kl" in self.extras,
                sharpness=self.dpo.weighting == "wpo" or "sharpness" in self.extras,
                prompts="prompt" in self.extras,
            )
        chosen_B, rejected_B = _sides(scores.logps_SL.sum(-1))
        ref_chosen_B, ref_rejected_B, *ref_common = self._reference_of(batch, scores)
        fields: dict[str, Any] = {}
        if "common" in self.extras:
            fields["chosen_common_B"], fields["rejected_common_B"] = _common(scores, scores.logps_SL)
            fields["ref_chosen_common_B"], fields["ref_rejected_common_B"] = ref_common
        if scores.kl_SL is not None:
            fields["chosen_kl_B"], fields["rejected_kl_B"] = _sides(scores.kl_SL.sum(-1))
        if scores.sharpness_SL is not None:
            means_S = scores.sharpness_SL.sum(-1) / scores.lengths_S
            fields["chosen_sharpness_B"], fields["rejected_sharpness_B"] = _sides(means_S)
        if scores.prompt_D is not None:
            fields["prompt_B"] = scores.prompt_D
            fields["prompt_tokens_B"] = torch.tensor(
                [len(e.chosen.prompt) - 1 for e in batch], device=chosen_B.device
            )
        tokens_B = _sides(scores.lengths_S)
        return PairLogps(
            chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, *tokens_B, totals=self.totals, **fields
        )

    def _reference_of(self, batch: Sequence[TokenPair], scores: BranchScores) -> list[Tensor]:
        """The reference's log-probs (B,) of chosen and rejected; with the extra "common" also those sums."""
        if scores.ref_logps_SL is not None:
            complete = _sides(scores.ref_logps_SL.sum(-1))
            common = _common(scores, scores.ref_logps_SL) if "common" in self.extras else ()
            return [*complete, *common]
        device = scores.logps_SL.device
        if not self.dpo.needs_reference:
            return [torch.zeros(len(batch), device=device)] * (4 if "common" in self.extras else 2)
        values = torch.from_numpy(np.stack([self.reference[e.id] for e in batch])).to(device)
        return list(values.T)

    def check_start(self) -> None:
        """Check that every log-ratio is zero if the policy is the reference.

        This detects a cache of another model, other tokens or another precision, active dropout, and a wrong
        mask, before the first step.
        """
        if not self.policy_is_reference or not self.dpo.check_rows:
            return
        with torch.no_grad():  # one at a time: together they may exceed a pack
            pairs = [self.logps([e]) for e in checked_at_start(self.examples, self.dpo.check_rows)]
        gaps_2B = torch.cat([ratio_B for p in pairs for ratio_B in (p.chosen_ratio_B, p.rejected_ratio_B)])
        require_reference_values(gaps_2B, self.config.engine.precision)

    def end_step(self, step: int) -> None:
        sync = self.dpo.reference_sync
        if sync is None or self.live is None or (step + 1) % sync.every:
            return
        move_towards(self.live, self.module, sync.mix)

    def state(self) -> dict[str, Any]:
        if self.dpo.reference_sync is None or self.live is None:
            return {}
        return {"reference": self.live.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.dpo.reference_sync is not None and self.live is not None:
            self.live.load_state_dict(state["reference"])


def _sides(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """The values (B,) of the chosen and of the rejected completions, which alternate."""
    return values_S[0::2], values_S[1::2]


def _common(scores: BranchScores, table_SL: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the first min(n_chosen, n_rejected) tokens of both sides."""
    shorter_S = scores.lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    inside_SL = torch.arange(table_SL.shape[1], device=table_SL.device) < shorter_S[:, None]
    return _sides((table_SL * inside_SL).sum(-1))


def build(job: Job, config: DpoConfig) -> tuple[Any, Export]:
    model, tokenizer, tokenise = start(job, config)
    pairs, dropped = tokenise.pairs(read_parquet(job.data))
    if not pairs:
        raise no_rows_left(dropped)
    trainer = DpoTrainer(
        model,
        pairs,
        config,
        reference=cached_reference(job) if reference_of(config) == "cached" else None,
        live_reference=load_model(Path(job.reference)) if job.reference else None,
        policy_is_reference=job.policy_is_reference,
        seed=job.seed,
        work=Path(job.work),
    )
    return trainer, export_model(model, tokenizer, job, config)
