"""What preference optimisation on pairs and on single answers shares: settings, and the check of step 0."""

from pydantic import Field
from torch import Tensor

from dpo_core.errors import StageFailed
from dpo_core.models.lora_config import LoraConfig
from dpo_core.objectives import Objective, ObjectiveName, Term, get
from dpo_core.training.config import EngineConfig, OptimConfig, PackedLoopConfig


class PreferenceConfig(PackedLoopConfig):
    """Which objective, and how it is trained."""

    objective: ObjectiveName
    """A name from `dpo objectives`."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Numbers of the objective; one that it does not read is an error."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""
    lora: LoraConfig | None = None
    """Train low-rank additions only, merged into the result; empty trains every weight."""
    limit: int | None = Field(None, ge=1)
    """Train on so many of the rows only, a seeded choice: for studies of few samples. Empty: on all."""
    check_rows: int = Field(8, ge=0)
    """Examples whose cached reference log-probs are computed again before the first step."""

    @property
    def terms(self) -> list[Term]:
        """The weighted sum, with every parameter filled in."""
        return [Term(self.objective, 1.0, get(self.objective).resolve(self.parameters))]

    @property
    def objectives(self) -> list[Objective]:
        """The objectives of the sum."""
        return [get(term.name) for term in self.terms]


# How far a log-prob of about 50 tokens may move between two batch shapes, in nats.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


def require_reference_values(gaps_B: Tensor, precision: str) -> None:
    """Refuse to start where log π/π_ref (B,) of a policy that is its own reference differs from zero.

    Raises:
        StageFailed: the cached log-probs are not those of this model.
    """
    gap, allowed = float(gaps_B.abs().max()), _TOLERANCE[precision]
    if not gap <= allowed:  # also refuses NaN
        raise StageFailed(
            f"before the first step policy and reference differ by {gap:.3g} nats "
            f"(allowed {allowed}), so the reference log-probs are not those of this model",
            "Run the cache stage again; if it repeats, the attention or precision of the two differ",
        )
