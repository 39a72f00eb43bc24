"""The method `kto`: KTO and BCO, on completions labelled desirable or not; its settings, data and trainer."""

from collections.abc import Mapping

from pydantic import model_validator

from dpo_core.methods.method import PREFERENCE, Method
from dpo_core.methods.preference import PreferenceConfig
from dpo_core.objectives import ObjectiveName, get

BALANCED = (1.0, 4 / 3)
"""The range that the KTO paper advises for λ_D·n_D / (λ_U·n_U) (Eq. 8 of arXiv 2402.01306)."""


def imbalance(parameters: Mapping[str, float], desirable: int, undesirable: int) -> str | None:
    """A warning if KTO's class weights do not suit the numbers of examples of the two classes, else None."""
    if "desirable_weight" not in parameters:
        return None
    if not desirable or not undesirable:
        missing = "undesirable" if desirable else "desirable"
        return f"There is no {missing} example: the model learns from one class only."
    ratio = parameters["desirable_weight"] * desirable / (parameters["undesirable_weight"] * undesirable)
    low, high = BALANCED
    if low - 1e-9 <= ratio <= high + 1e-9:
        return None
    advised = min(max(ratio, low), high) / ratio * parameters["desirable_weight"]
    return (
        f"desirable_weight·n_D / (undesirable_weight·n_U) is {ratio:.3g} with {desirable:,} desirable and "
        f"{undesirable:,} undesirable examples; the KTO paper advises 1 to 4/3 (its Eq. 8): set "
        f"desirable_weight to {advised:.3g}."
    )


class KtoConfig(PreferenceConfig):
    """Preference optimisation on single answers.

    Pairs are split into a desirable answer (chosen) and an undesirable one (rejected); an example of a batch
    is then one answer.
    """

    objective: ObjectiveName = "kto"
    """kto or bco."""

    @model_validator(mode="after")
    def _learns_from_single_answers(self) -> "KtoConfig":
        if get(self.objective).data != "unpaired":
            raise ValueError(f"objective '{self.objective}' learns from pairs: set method to dpo")
        get(self.objective).resolve(self.parameters)
        return self

    @property
    def reads_mismatched(self) -> bool:
        """Whether the objective reads log-probs of mismatched pairs."""
        return self.objective == "kto"


METHOD = Method(
    name="kto",
    title="Preference optimisation on single answers: KTO and BCO",
    citation="Ethayarajh et al. 2024, arXiv 2402.01306; Jung et al. 2024, arXiv 2404.04656",
    settings=KtoConfig,
    data="unpaired",
    curves=PREFERENCE,
    reference=lambda config: "cached",
)
