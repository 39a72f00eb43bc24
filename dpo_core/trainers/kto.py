"""Trains on single completions, each labelled desirable or not (KTO and BCO).

Both losses depend on a number of the global batch: KTO's z_0 and BCO's delta. It is computed before the
losses, in a separate forward pass without gradient, over all ranks. The loss therefore does not depend on how
a batch is split into micro-batches, packs and ranks. That pass takes about a third of a step's time.

Shapes: B examples of a micro-batch.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_core.data.files.parquet import read_parquet
from dpo_core.examples.unpaired import UnpairedExample, mismatched, unpaired_examples
from dpo_core.methods.job import Job
from dpo_core.methods.kto import KtoConfig, imbalance
from dpo_core.objectives import UnpairedLogps, class_means, get, unpaired_metrics, z0
from dpo_core.reference import LogpShard, sequence_key
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import round_up_to_block
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.trainers.common import (
    Export,
    cached_reference,
    checked_at_start,
    export_model,
    require_reference_values,
    start,
)
from dpo_core.training.batches import Batch
from dpo_core.training.loop import PackedTrainer

log = logging.getLogger(__name__)


class UnpairedTrainer(PackedTrainer[UnpairedExample]):
    """Trainer whose loss is the mean over the examples of the global batch of an objective.

    Args:
        reference: log-probs under the reference of every example and, for KTO, of every mismatched pair.
        policy_is_reference: the policy starts as the reference, so the first loss has a known value.

    Raises:
        DataError: KTO with fewer than two different examples.
        StageFailed: the reference log-probs lack a sequence.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: Sequence[UnpairedExample],
        config: KtoConfig,
        *,
        reference: LogpShard,
        policy_is_reference: bool,
        seed: int,
        work: Path,
    ) -> None:
        super().__init__(module, examples, config, seed=seed, work=work)
        self.dpo, self.objective = config, get(config.objective)
        self.parameters = config.terms[0].parameters
        self.beta = self.parameters["beta"]
        self.policy_is_reference = policy_is_reference
        self.longest = max(len(e.sequence) for e in examples)
        self.mismatched: dict[str, UnpairedExample] = {}
        """For KTO, the mismatched pair of each example, by its id."""
        if config.reads_mismatched:
            pairs = zip(examples, mismatched(examples), strict=True)
            self.mismatched = {e.id: replace(e, sequence=other) for e, other in pairs}
        sequences = list({e.sequence: None for e in (*examples, *self.mismatched.values())})
        # Raises for a stale or incomplete cache before training starts.
        sums = reference.sums([sequence_key(s) for s in sequences]).astype(np.float32)
        self.reference = dict(zip(sequences, sums.tolist(), strict=True))
        self.kl: Tensor | None = None
        self.baseline: Tensor | None = None
        self.rewards, self.seen = 0.0, 0
        desirable = sum(e.desirable for e in examples)
        if (warning := imbalance(self.parameters, desirable, len(examples) - desirable)) is not None:
            log.warning("%s", warning)

    def document(self, example: UnpairedExample) -> Document:
        return Document.of(example.sequence)

    def length(self, example: UnpairedExample) -> int:
        return len(example.sequence)

    def weight(self, example: UnpairedExample) -> float:
        return 1.0

    def begin_step(self, batch: Sequence[UnpairedExample]) -> None:
        total = self._ratio_sum(self._coupling_examples(batch))
        if self.mismatched:
            self.kl = z0(total, len(batch))
            return
        self.rewards += self.beta * float(total)
        self.seen += len(batch)
        self.baseline = torch.tensor(self.rewards / self.seen, device=self.engine.device)

    def flops(self, batch: Batch) -> float:
        coupling = self._coupling_examples([self.examples[i] for i in batch.examples])
        shares = self._shares(coupling)
        passes = [share[min(n, len(share) - 1)] for n in range(max(map(len, shares))) for share in shares]
        return super().flops(batch) + sum(cost.forward(self.shape, *self.sizes(micro)) for micro in passes)

    def losses(self, batch: Sequence[UnpairedExample]) -> tuple[Tensor, dict[str, Tensor]]:
        policy_B, ref_B, tokens_B = self._logps(batch)
        desirable_B = torch.tensor([e.desirable for e in batch], device=policy_B.device)
        logps = UnpairedLogps(policy_B, ref_B, tokens_B, desirable_B, kl=self.kl, baseline=self.baseline)
        losses_B = self.objective.function(logps, **self.parameters)
        numbers = unpaired_metrics(logps, self.beta)
        return losses_B.sum(), {name: value_B.sum() for name, value_B in numbers.items()}

    def _logps(self, batch: Sequence[UnpairedExample]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs under policy and reference, and the completions' tokens, each (B,)."""
        with autocast(self.config.engine.precision, self.engine.device):
            scores = branch_scores(self.module, self.lay_out(batch))
        policy_B = scores.logps_SL.sum(-1)
        ref_B = torch.tensor([self.reference[e.sequence] for e in batch], device=policy_B.device)
        return policy_B, ref_B, scores.lengths_S

    def _coupling_examples(self, batch: Sequence[UnpairedExample]) -> Sequence[UnpairedExample]:
        """The examples that z_0 or delta is computed on: KTO's mismatched pairs, or the batch itself."""
        return [self.mismatched[e.id] for e in batch] if self.mismatched else batch

    @torch.no_grad()
    def _ratio_sum(self, examples: Sequence[UnpairedExample]) -> Tensor:
        """Sum of log π/π_ref over the examples of all ranks; 0-dim, float64."""
        shares = self._shares(examples)
        own = shares[self.engine.rank]
        total = torch.zeros((), dtype=torch.float64)
        for number in range(max(map(len, shares))):
            # With ZeRO 3 every rank takes part in every pass; a rank without one repeats its last.
            policy_B, ref_B, _ = self.engine.run(self._logps, own[min(number, len(own) - 1)])
            if number < len(own):
                total += (policy_B.double() - ref_B).sum().cpu()
        return self.engine.all_sum(total)

    def _shares(self, examples: Sequence[UnpairedExample]) -> list[list[list[UnpairedExample]]]:
        """The forward passes of each rank."""
        order = sorted(examples, key=self.length, reverse=True)
        world = self.engine.world
        return [self._passes(order[rank::world]) for rank in range(world)]

    def _passes(self, examples: Sequence[UnpairedExample]) -> list[list[UnpairedExample]]:
        """The examples in groups that each fit one forward pass."""
        budget = self._fixed_length() or self.config.pack_tokens or 0
        groups: list[list[UnpairedExample]] = [[]]
        used = 0
        for example in examples:
            size = len(self.document(example))
            full = used + size > budget if self.packed else len(groups[-1]) == self.config.micro_batch_size
            if full and groups[-1]:
                groups.append([])
                used = 0
            groups[-1].append(example)
            used += size
        return groups

    def _fixed_length(self) -> int | None:
        # Mismatched pairs are packed too, and may be as long as the longest example.
        fixed = super()._fixed_length()
        return None if fixed is None else max(fixed, round_up_to_block(self.longest))

    def _reduce(self, sums: dict[str, Tensor], examples: int) -> dict[str, float]:
        totals = super()._reduce(sums, 1)  # sums over the global batch
        loss = totals.pop("loss")
        counts = {name: total for name, total in totals.items() if name.startswith("count/")}
        values = {"kl": self.kl, "delta": self.baseline}
        coupling = {name: float(value) for name, value in values.items() if value is not None}
        return {"loss": loss, **class_means(totals), **counts, **coupling}

    @torch.no_grad()
    def check_start(self) -> None:
        """Check that every log-ratio is zero if the policy is the reference, also of mismatched pairs."""
        if not self.policy_is_reference or not self.dpo.check_rows:
            return
        examples = checked_at_start(self.examples, self.dpo.check_rows)
        examples += [self.mismatched[e.id] for e in examples if e.id in self.mismatched]
        logps = [self._logps(group) for group in self._passes(examples)]
        gaps_B = torch.cat([policy_B - ref_B for policy_B, ref_B, _ in logps])
        require_reference_values(gaps_B, self.config.engine.precision)

    def state(self) -> dict[str, Any]:
        return {} if self.mismatched else {"rewards": self.rewards, "seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        if not self.mismatched:
            self.rewards, self.seen = float(state["rewards"]), int(state["seen"])


def build(job: Job, config: KtoConfig) -> tuple[Any, Export]:
    model, tokenizer, tokenise = start(job, config)
    examples, _ = unpaired_examples(tokenise, read_parquet(job.data))
    trainer = UnpairedTrainer(
        model,
        examples,
        config,
        reference=cached_reference(job),
        policy_is_reference=job.policy_is_reference,
        seed=job.seed,
        work=Path(job.work),
    )
    return trainer, export_model(model, tokenizer, job, config)
