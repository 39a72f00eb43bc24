"""Preference optimisation on pairs, against cached reference log-probs or a live reference.

Shapes: B pairs, S = 2B completions (chosen and rejected in turn), L tokens of the longest, E training pairs.
"""

import logging
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dpo_core.config import Config
from dpo_core.data.tokens.tokenise import Sequence, Tokenise, TokenPair
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.methods.build import export_model, read_rows, start
from dpo_core.methods.estimate import Inputs, Work, loop, with_forward_pass
from dpo_core.methods.job import Job
from dpo_core.methods.method import PREFERENCE, Export, Method, Reference
from dpo_core.methods.preference import PreferenceConfig, require_reference_values
from dpo_core.models.load import load_model
from dpo_core.objectives import (
    ObjectiveName,
    PairLogps,
    Term,
    Totals,
    combine,
    get,
    pair_metrics,
    wpo_weights,
)
from dpo_core.reference import LogpShard, sequence_key
from dpo_core.scoring import flops as cost
from dpo_core.scoring.branch_scores import BranchScores, branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.flops import keeps_logits
from dpo_core.scoring.logprobs import autocast
from dpo_core.scoring.model_shape import shape_of
from dpo_core.training.loop import PackedTrainer

log = logging.getLogger(__name__)


class TermConfig(Config):
    """One more objective in a weighted sum."""

    objective: ObjectiveName
    """A name from `dpo objectives`."""
    weight: float = Field(1.0, gt=0)
    """What it counts in the sum."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Numbers of the objective."""


class ReferenceSync(Config):
    """TR-DPO: the reference follows the policy."""

    every: int = Field(512, ge=1)
    """Optimiser steps between updates."""
    mix: float = Field(0.6, gt=0, le=1)
    """The policy's share: reference = mix · policy + (1 - mix) · reference."""


class DpoConfig(PreferenceConfig):
    """Preference optimisation on pairs."""

    objective: ObjectiveName = "dpo"
    """A name from `dpo objectives`, of those that learn from pairs."""
    weight: float = Field(1.0, gt=0)
    """What the objective counts where `plus` adds others."""
    plus: list[TermConfig] = Field(default_factory=list)
    """Further objectives, summed with their weights: `sft` makes RPO, `bco_pair` and `sft` make MPO."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: each pair counts by how likely the policy itself is to write it (WPO, arXiv 2406.11827)."""
    reference_sync: ReferenceSync | None = None
    """TR-DPO's moving reference (arXiv 2404.09656); keeps the reference in memory beside the policy."""

    @model_validator(mode="after")
    def _objectives_fit(self) -> "DpoConfig":
        for term in self.terms:
            if get(term.name).data != "pairs":
                raise ValueError(
                    f"objective '{term.name}' learns from single answers: set method: kto, whose objectives "
                    "are kto and bco"
                )
        if self.weight != 1 and not self.plus:
            raise ValueError("weight is read only where plus adds other objectives")
        if self.reference_sync and not self.needs_reference:
            raise ValueError(f"objective '{self.objective}' has no reference that reference_sync could move")
        if self.reference_sync and self.lora:
            raise ValueError("reference_sync moves whole weights, and lora trains additions: choose one")
        if self.reference_sync and self.engine.zero_stage == 3:
            raise ValueError("reference_sync needs whole weights on each rank: choose zero_stage 0 to 2")
        return self

    @property
    def terms(self) -> list[Term]:
        first = Term(self.objective, self.weight, get(self.objective).resolve(self.parameters))
        return [first] + [
            Term(t.objective, t.weight, get(t.objective).resolve(t.parameters)) for t in self.plus
        ]

    @property
    def needs_reference(self) -> bool:
        """Whether any objective reads reference log-probs."""
        return any(o.needs_reference for o in self.objectives)

    @property
    def needs_live_reference(self) -> bool:
        """Whether the reference has to be in memory: whole distributions, or one that moves."""
        return self.reference_sync is not None or any(o.needs_full_vocabulary for o in self.objectives)


class DpoTrainer(PackedTrainer[TokenPair]):
    """Mean over the pairs of the global batch of a weighted sum of pair objectives.

    Args:
        reference: log-probs of every sequence of `examples` under the reference.
        live_reference: the reference itself, where `config.needs_live_reference`; it is frozen.
        policy_is_reference: the policy starts as the reference, so the first loss has a known value.

    Raises:
        RecipeError: an objective that couples the whole batch does not get it in one forward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: Seq[TokenPair],
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
        elif config.needs_reference:
            if reference is None:
                raise StageFailed("the DPO job names no reference log-probs", "Run the cache stage first")
            self.reference = self._cached(reference)
        self._require_whole_batches()

    def _require_whole_batches(self) -> None:
        coupled = [o.name for o in self.dpo.objectives if o.batch_coupled]
        parts = self.batches.micro_batches * self.engine.world
        if coupled and parts != 1:
            raise RecipeError(
                f"objective '{coupled[0]}' compares all pairs of a batch, and a batch is in {parts} parts",
                "Train in one process, and raise pack_tokens (or micro_batch_size) until a batch is one pass",
            )

    def _cached(self, shard: LogpShard) -> dict[str, np.ndarray]:
        """By id: reference log-probs of chosen and rejected, whole and up to the shorter one's length."""
        # A stale or partial cache is refused here, before anything runs.
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

    def begin_step(self, everyone: Seq[TokenPair]) -> None:
        self.totals = Totals(
            pairs=len(everyone),
            chosen_tokens=sum(e.chosen.targets for e in everyone),
            prompt_tokens=sum(len(e.chosen.prompt) - 1 for e in everyone),
        )

    def micro_flops(self, micro: Seq[TokenPair]) -> float:
        sizes = self.sizes(micro)
        total = self.trained_flops(sizes)
        if "prompt" in self.extras:
            total += self.trained_flops(cost.Sizes(0, 0, sum(len(e.chosen.prompt) - 1 for e in micro)))
        if self.live is not None:
            total += cost.forward(self.live_shape, *sizes)
            # The KL's backward pass reads the reference's distribution: computed again where the policy's is.
            if "kl" in self.extras and not keeps_logits(round(sizes.scored), self.shape.vocabulary):
                total += cost.forward(self.live_shape, 0, 0, sizes.scored)
        return total

    def losses(self, batch: Seq[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        logps = self.logps(batch)
        losses_B = combine(self.terms, logps)
        if self.dpo.weighting == "wpo":
            losses_B = losses_B * wpo_weights(logps)
        numbers = pair_metrics(logps, self.beta, per_token=self.rewards_per_token)
        return losses_B.sum(), {name: value_B.sum() for name, value_B in numbers.items()}

    def logps(self, batch: Seq[TokenPair]) -> PairLogps:
        """Both sides of every pair in one forward pass, beside what the reference says of them."""
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

    def _reference_of(self, batch: Seq[TokenPair], scores: BranchScores) -> list[Tensor]:
        """The reference's (B,) of chosen and rejected, and both again in common where it is read."""
        if scores.ref_logps_SL is not None:
            whole = _sides(scores.ref_logps_SL.sum(-1))
            common = _common(scores, scores.ref_logps_SL) if "common" in self.extras else ()
            return [*whole, *common]
        device = scores.logps_SL.device
        if not self.dpo.needs_reference:
            return [torch.zeros(len(batch), device=device)] * (4 if "common" in self.extras else 2)
        values = torch.from_numpy(np.stack([self.reference[e.id] for e in batch])).to(device)
        return list(values.T)

    def check_start(self) -> None:
        """With policy = reference every log-ratio is zero and the loss is the objective's known value.

        A cache of another model, other tokens or another precision, active dropout and a wrong mask all show
        here, before a step is spent.
        """
        if not self.policy_is_reference or not self.dpo.check_rows:
            return
        chosen = np.random.default_rng(0).permutation(len(self.examples))[: self.dpo.check_rows]
        with torch.no_grad():  # one by one: together they may be more than a pack
            found = [self.logps([self.examples[i]]) for i in chosen]
        gaps_2B = torch.cat([ratio_B for p in found for ratio_B in (p.chosen_ratio_B, p.rejected_ratio_B)])
        require_reference_values(gaps_2B, self.config.engine.precision)

    def end_step(self, step: int) -> None:
        sync = self.dpo.reference_sync
        if sync is None or self.live is None or (step + 1) % sync.every:
            return
        with torch.no_grad():
            for mine, theirs in zip(self.live.parameters(), self.module.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), sync.mix)

    def state(self) -> dict[str, Any]:
        if self.dpo.reference_sync is None or self.live is None:
            return {}
        return {"reference": self.live.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.dpo.reference_sync is not None and self.live is not None:
            self.live.load_state_dict(state["reference"])


def _sides(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) of the chosen and of the rejected, which take turns."""
    return values_S[0::2], values_S[1::2]


def _common(scores: BranchScores, table_SL: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the first min(n_chosen, n_rejected) tokens of both sides."""
    shorter_S = scores.lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    inside_SL = torch.arange(table_SL.shape[1], device=table_SL.device) < shorter_S[:, None]
    return _sides((table_SL * inside_SL).sum(-1))


def reference_of(config: DpoConfig) -> Reference:
    """See `Method.reference`. Cached log-probs are not read beside a reference in memory."""
    if config.needs_live_reference:
        return "live"
    return "cached" if config.needs_reference else "none"


def cached_sequences(
    tokenise: Tokenise, rows: Seq[dict[str, Any]], config: DpoConfig
) -> tuple[list[Sequence], dict[str, int]]:
    """See `Method.cached`."""
    pairs, dropped = tokenise.pairs(rows)
    return [s for p in pairs for s in (p.chosen, p.rejected)], dropped


def build(job: Job, config: DpoConfig) -> tuple[Any, Export]:
    """See `Method.build`."""
    model, tokenizer, tokenise = start(job, config)
    pairs, dropped = tokenise.pairs(read_rows(job.data))
    if not pairs:
        raise StageFailed(f"no training row is left after tokenising ({dropped})", "Raise tokens.max_length")
    trainer = DpoTrainer(
        model,
        pairs,
        config,
        reference=LogpShard.open(Path(job.reference_logps)) if job.reference_logps else None,
        live_reference=load_model(Path(job.reference)) if job.reference else None,
        policy_is_reference=job.policy_is_reference,
        seed=job.seed,
        work=Path(job.work),
    )
    return trainer, export_model(model, tokenizer, job, lora=config.lora is not None)


def estimate(config: DpoConfig, inputs: Inputs) -> Work:
    """See `Method.estimate`. A reference in memory reads every example too."""
    work = loop(config, inputs.examples("pairs", config.limit), inputs)
    return with_forward_pass(work, inputs.shape, references=1) if config.needs_live_reference else work


METHOD = Method(
    name="dpo",
    title="Direct preference optimisation and its relatives on pairs",
    citation="Rafailov et al. 2023, arXiv 2305.18290; each objective names its own paper",
    settings=DpoConfig,
    data="pairs",
    build=build,
    estimate=estimate,
    curves=PREFERENCE,
    version=2,
    reference=reference_of,
    cached=cached_sequences,
)
