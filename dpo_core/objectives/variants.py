"""Published methods that are settings of an objective, without a function of their own."""

import math
from dataclasses import dataclass
from typing import Any

from dpo_core.objectives.parameter import Parameter


@dataclass(frozen=True)
class Variant:
    """A published method, and its settings in a recipe."""

    name: str
    setting: str
    """The settings of a recipe, as YAML."""
    citation: str
    needs: tuple[str, ...]
    parameters: dict[str, Parameter]
    definition: str

    def facts(self) -> dict[str, Any]:
        """All facts as plain JSON data, with the keys of `Objective.facts`; no upper limit is None."""
        numbers = {
            name: parameter._asdict() | {"high": parameter.high if parameter.high < math.inf else None}
            for name, parameter in self.parameters.items()
        }
        return vars(self) | {"needs": list(self.needs), "parameters": numbers}


_WEIGHT = Parameter(1.0, 0.0, math.inf, "weight of the term in the sum; above 0")

VARIANTS = (
    Variant(
        "rpo",
        "policies: {RPO: {method: dpo, plus: [{objective: sft, weight: 1}]}}",
        "Pang et al., Iterative Reasoning Preference Optimization, NeurIPS 2024, arXiv 2404.19733 (weight "
        "1); Liu et al., Provably Mitigating Overoptimization in RLHF, 2024, arXiv 2405.16436 (weight 0.005)",
        ("pairs", "reference"),
        {"plus.weight": _WEIGHT},
        "DPO + weight·NLL of the chosen completions: `sft` is the mean over the tokens of the global batch "
        "(TRL), `sft_mean` divides each completion by its own length (Pang et al.).",
    ),
    Variant(
        "mpo",
        "policies: {MPO: {method: dpo, weight: 0.8, plus: [{objective: bco_pair, weight: 0.2}, "
        "{objective: sft, weight: 1}]}}",
        "Wang et al., Mixed Preference Optimization, 2024, arXiv 2411.10442",
        ("pairs", "reference"),
        {"weight": _WEIGHT, "plus.weight": _WEIGHT},
        "Weighted sum of DPO, BCO on pairs and the NLL of the chosen completions; any objectives on pairs "
        "can be summed so.",
    ),
    Variant(
        "wpo",
        "policies: {WPO: {method: dpo, weighting: wpo}}",
        "Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, EMNLP 2024, "
        "arXiv 2406.11827",
        ("pairs", "reference"),
        {},
        "Each pair counts by how likely the policy itself is to write it, measured against its own average "
        "token; no gradient through the weight. As TRL `use_weighting`.",
    ),
    Variant(
        "tr_dpo",
        "policies: {TR-DPO: {method: dpo, reference_sync: {every: 512, mix: 0.6}}}",
        "Gorbatovski et al., Learn Your Reference Model for Real Good Alignment, 2024, arXiv 2404.09656",
        ("pairs", "live reference"),
        {
            "reference_sync.every": Parameter(512, 1, math.inf, "optimiser steps between updates"),
            "reference_sync.mix": Parameter(0.6, 0.0, 1.0, "the policy's share in an update; above 0"),
        },
        "The reference moves: reference = mix·policy + (1 - mix)·reference. Not with lora or zero_stage 3.",
    ),
    Variant(
        "pre_dpo",
        "policies: {Guide: {method: dpo}, Pre-DPO: {method: dpo, reference: Guide}}",
        "Pan, Shen, Huang, Zhou, Zhang, Pre-DPO: Improving Data Utilization in Direct Preference "
        "Optimization Using a Guiding Reference Model, AAAI 2026, arXiv 2504.15843",
        ("pairs", "reference"),
        {},
        "Two policies: a guide is trained first (DPO or SimPO in the paper) and becomes the reference of a "
        "second one, which starts again from the SFT model. The recipe pre-dpo shows it.",
    ),
)
