"""Preference optimisation on single completions, each labelled desirable or not: KTO and BCO."""

from collections.abc import Mapping

from pydantic import model_validator

from dpo_core.methods.method import PREFERENCE, Method
from dpo_core.methods.preference import PreferenceConfig
from dpo_core.objectives import ObjectiveName, get

BALANCED = (1.0, 4 / 3)
"""Where the KTO paper wants λ_D·n_D / (λ_U·n_U) to lie (Eq. 8 of arXiv 2402.01306)."""


def imbalance(parameters: Mapping[str, float], desirable: int, undesirable: int) -> str | None:
    """What is wrong with KTO's class weights for so many examples of each class; None if nothing is."""
    if "desirable_weight" not in parameters:
        return None
    if not desirable or not undesirable:
        missing = "undesirable" if desirable else "desirable"
        return f"There is no {missing} example: the model learns only what one class teaches."
    ratio = parameters["desirable_weight"] * desirable / (parameters["undesirable_weight"] * undesirable)
    low, high = BALANCED
    if low - 1e-9 <= ratio <= high + 1e-9:
        return None
    wanted = min(max(ratio, low), high) / ratio * parameters["desirable_weight"]
    return (
        f"desirable_weight·n_D / (undesirable_weight·n_U) is {ratio:.3g} with {desirable:,} desirable and "
        f"{undesirable:,} undesirable examples; the KTO paper advises 1 to 4/3 (its Eq. 8): set "
        f"desirable_weight to {wanted:.3g}."
    )


class KtoConfig(PreferenceConfig):
    """Preference optimisation on single answers.

    Pairs are taken apart, chosen as desirable and rejected as undesirable; an example of a batch is then one
    answer.
    """

    objective: ObjectiveName = "kto"
    """kto or bco."""

    @model_validator(mode="after")
    def _learns_from_single_answers(self) -> "KtoConfig":
        if get(self.objective).data != "unpaired":
            raise ValueError(f"objective '{self.objective}' learns from pairs: set method: dpo")
        get(self.objective).resolve(self.parameters)
        return self

    @property
    def reads_mismatched(self) -> bool:
        """Whether the objective compares with mismatched pairs, whose reference log-probs it then needs."""
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
