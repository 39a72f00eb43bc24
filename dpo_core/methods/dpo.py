"""The method `dpo`: DPO and the other objectives on pairs; its settings, data and trainer."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.methods.method import PREFERENCE, Method, Reference
from dpo_core.methods.preference import PreferenceConfig
from dpo_core.objectives import (
    ObjectiveName,
    Term,
    get,
)


class TermConfig(Config):
    """One more objective in a weighted sum."""

    objective: ObjectiveName
    """A name from `dpo objectives`."""
    weight: float = Field(1.0, gt=0)
    """Its weight in the sum."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Parameters of the objective."""


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
    """Weight of the objective in the sum, if `plus` adds others."""
    plus: list[TermConfig] = Field(default_factory=list)
    """Further objectives, summed with their weights: `sft` makes RPO, `bco_pair` and `sft` make MPO."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: pairs are weighted by how likely the policy is to generate them (WPO, arXiv 2406.11827)."""
    reference_sync: ReferenceSync | None = None
    """TR-DPO's moving reference (arXiv 2404.09656); keeps the reference in memory beside the policy."""

    @model_validator(mode="after")
    def _objectives_fit(self) -> "DpoConfig":
        for term in self.terms:
            if get(term.name).data != "pairs":
                raise ValueError(
                    f"objective '{term.name}' learns from single answers: set method to kto, which has the "
                    "objectives kto and bco"
                )
        if self.weight != 1 and not self.plus:
            raise ValueError("weight has no effect, because plus adds no other objective. Remove it")
        if self.reference_sync and not self.needs_reference:
            raise ValueError(f"objective '{self.objective}' has no reference that reference_sync could move")
        if self.reference_sync and self.lora:
            raise ValueError("reference_sync mixes all weights, and lora trains only added ones: choose one")
        if self.reference_sync and self.engine.zero_stage == 3:
            raise ValueError("reference_sync needs all weights on each rank: choose zero_stage 0 to 2")
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
        """Whether the reference has to be in memory: its whole distributions are read, or it moves."""
        return self.reference_sync is not None or any(o.needs_full_vocabulary for o in self.objectives)


def reference_of(config: DpoConfig) -> Reference:
    """See `Method.reference`. With a reference in memory, cached log-probs are not read."""
    if config.needs_live_reference:
        return "live"
    return "cached" if config.needs_reference else "none"


METHOD = Method(
    name="dpo",
    title="Direct preference optimisation and its relatives on pairs",
    citation="Rafailov et al. 2023, arXiv 2305.18290; each objective names its own paper",
    settings=DpoConfig,
    data="pairs",
    curves=PREFERENCE,
    version=2,
    reference=reference_of,
)
