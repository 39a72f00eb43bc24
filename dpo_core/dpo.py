"""Preference optimisation on pairs, against cached reference log-probs."""

import logging
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dpo_core.adapters import LoraConfig
from dpo_core.engine_config import EngineConfig, OptimConfig
from dpo_core.errors import StageFailed
from dpo_core.logprobs import autocast, collate, sum_logps
from dpo_core.objectives import PairLogps, get, pair_metrics
from dpo_core.reference import LogpShard, sequence_key
from dpo_core.tokens import TokenPair
from dpo_core.training import LoopConfig, Trainer

log = logging.getLogger(__name__)


class DpoConfig(LoopConfig):
    """Which objective, and how it is trained."""

    objective: str = "dpo"
    """A name from `dpo objectives`."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Numbers of the objective; one that it does not read is an error."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""
    lora: LoraConfig | None = None
    """Train low-rank additions only, merged into the result; empty trains every weight."""
    check_rows: int = Field(8, ge=0)
    """Pairs whose cached reference log-probs are computed again before the first step."""

    @model_validator(mode="after")
    def _objective_exists(self) -> "DpoConfig":
        get(self.objective).resolve(self.parameters)
        return self


# How far a log-prob of about 50 tokens may move between two batch shapes, in nats.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


class DpoTrainer(Trainer[TokenPair]):
    """Mean over the pairs of the global batch of a pair objective.

    Args:
        reference: log-probs of every sequence of `examples` under the reference.
        policy_is_reference: the policy starts as the reference, so the first loss has a known value.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: Seq[TokenPair],
        config: DpoConfig,
        *,
        reference: LogpShard,
        policy_is_reference: bool,
        seed: int,
        work: Path,
    ) -> None:
        super().__init__(module, examples, config, seed=seed, work=work)
        self.dpo = config
        self.objective = get(config.objective)
        self.parameters = self.objective.resolve(config.parameters)
        scale = self.objective.reward_scale
        self.beta = self.parameters[scale] if scale else 1.0
        self.policy_is_reference = policy_is_reference
        keys = [sequence_key(s) for e in examples for s in (e.chosen, e.rejected)]
        # (pairs, 2): chosen and rejected; a stale or partial cache is refused here, before anything runs.
        sums = reference.sums(keys).astype(np.float32).reshape(-1, 2)
        self.reference = {e.id: row for e, row in zip(examples, sums, strict=True)}

    def length(self, example: TokenPair) -> int:
        return max(len(example.chosen), len(example.rejected))

    def tokens(self, example: TokenPair) -> int:
        return len(example.chosen) + len(example.rejected)

    def weight(self, example: TokenPair) -> float:
        return 1.0

    def losses(self, batch: Seq[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        logps = self.logps(batch)
        losses_B = self.objective.function(logps, **self.parameters)
        return losses_B.sum(), {k: v.sum() for k, v in pair_metrics(logps, self.beta).items()}

    def logps(self, batch: Seq[TokenPair]) -> PairLogps:
        """Both sides in one forward pass of 2B rows, with the reference looked up by id."""
        device = self.engine.device
        rows = collate([e.chosen for e in batch] + [e.rejected for e in batch]).to(device)
        with autocast(self.config.engine.precision, device):
            chosen_B, rejected_B = sum_logps(self.module, rows).chunk(2)
        reference_B2 = torch.from_numpy(np.stack([self.reference[e.id] for e in batch])).to(device)
        lengths_B2 = torch.tensor(
            [[len(e.chosen.completion), len(e.rejected.completion)] for e in batch], device=device
        )
        return PairLogps(chosen_B, rejected_B, *reference_B2.T, *lengths_B2.T)

    def check_start(self) -> None:
        """With policy = reference every log-ratio is zero and the loss is the objective's known value.

        A cache of another model, other tokens or another precision, active dropout and a wrong mask all show
        here, before a step is spent.
        """
        if not self.policy_is_reference or not self.dpo.check_rows:
            return
        chosen = np.random.default_rng(0).permutation(len(self.examples))[: self.dpo.check_rows]
        with torch.no_grad():
            logps = self.logps([self.examples[i] for i in chosen])
        gaps_B = torch.cat([logps.chosen_ratio_B, logps.rejected_ratio_B]).abs()
        allowed = _TOLERANCE[self.config.engine.precision]
        if not gaps_B.max() <= allowed:
            raise StageFailed(
                f"before the first step policy and reference differ by {gaps_B.max():.3g} nats "
                f"(allowed {allowed}), so the reference log-probs are not those of this model",
                "Run the cache stage again; if it repeats, the attention or precision of the two differ",
            )
        if self.objective.value_at_reference:
            known = self.objective.value_at_reference(self.parameters)
            loss = float(self.objective.function(logps, **self.parameters).mean())
            log.info("loss at the start %.6f, known value %.6f", loss, known)
