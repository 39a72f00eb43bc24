"""Settings shared by preference optimisation on pairs and on single completions."""

from pydantic import Field

from dpo_core.models.lora_config import LoraConfig
from dpo_core.objectives import Objective, ObjectiveName, Term, get
from dpo_core.training.config import EngineConfig, OptimConfig, PackedLoopConfig


class PreferenceConfig(PackedLoopConfig):
    """Preference optimisation with an objective."""

    objective: ObjectiveName
    """A name from `dpo objectives`."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Parameters of the objective; one that it does not read is an error."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""
    lora: LoraConfig | None = None
    """Train only LoRA weights, which are merged into the result; empty: train all weights."""
    limit: int | None = Field(None, ge=1)
    """Train on a seeded choice of this number of rows, for studies of few samples. Empty: all rows."""
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
