"""Random inputs for objectives of either kind, in float64, and how to cut and join them."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

from dpo_core.objectives import Objective, PairLogps, Totals, UnpairedLogps

# For property tests: there are many, so a dozen cases each, and no limit on one of them on a busy machine.
few = settings(max_examples=12, deadline=None)

# A default of zero would leave the parameter's term out of a test.
NOT_DEFAULT = {
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "cpo": {"label_smoothing": 0.1},
    "kto": {"desirable_weight": 1.2, "undesirable_weight": 0.7},
}

# Which optional fields belong to which extra.
EXTRAS = {
    "kl": ["chosen_kl_B", "rejected_kl_B"],
    "common": ["chosen_common_B", "rejected_common_B", "ref_chosen_common_B", "ref_rejected_common_B"],
    "prompt": ["prompt_B", "prompt_tokens_B"],
    "sharpness": ["chosen_sharpness_B", "rejected_sharpness_B"],
}

Inputs = Any
"""PairLogps or UnpairedLogps, as the objective asks."""


def pairs_at(n: int = 8, seed: int = 0, spread: float = 1.5) -> PairLogps:
    """Completions of 1 to 20 tokens with log-ratios of `spread` nats, every extra filled in."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(n, generator=g, dtype=torch.float64)

    def counts() -> Tensor:
        return torch.randint(1, 21, (n,), generator=g)

    ref_chosen, ref_rejected = normal(3, -40), normal(3, -40)
    common = [normal(2, -20), normal(2, -20)]
    return PairLogps(
        chosen_B=ref_chosen + normal(spread),
        rejected_B=ref_rejected + normal(spread),
        ref_chosen_B=ref_chosen,
        ref_rejected_B=ref_rejected,
        chosen_tokens_B=counts(),
        rejected_tokens_B=counts(),
        chosen_kl_B=normal(1).abs(),
        rejected_kl_B=normal(1).abs(),
        chosen_common_B=common[0] + normal(spread / 2),
        rejected_common_B=common[1] + normal(spread / 2),
        ref_chosen_common_B=common[0],
        ref_rejected_common_B=common[1],
        prompt_B=normal(3, -30),
        prompt_tokens_B=counts(),
        chosen_sharpness_B=normal(0.3),
        rejected_sharpness_B=normal(0.3),
    )


def unpaired_at(n: int = 8, seed: int = 0, spread: float = 1.5) -> UnpairedLogps:
    """Every other example desirable, with z_0 = 0.4 and delta = 0.03."""
    logps = pairs_at(n, seed, spread)
    return UnpairedLogps(
        policy_B=logps.chosen_B,
        ref_B=logps.ref_chosen_B,
        tokens_B=logps.chosen_tokens_B,
        desirable_B=torch.arange(n) % 2 == 0,
        kl=torch.tensor(0.4, dtype=torch.float64),
        baseline=torch.tensor(0.03, dtype=torch.float64),
    )


def inputs_for(objective: Objective, n: int = 8, seed: int = 0, spread: float = 1.5) -> Inputs:
    make = pairs_at if objective.data == "pairs" else unpaired_at
    return make(n, seed, spread)


def parameters_for(objective: Objective) -> dict[str, float]:
    return objective.resolve(NOT_DEFAULT.get(objective.name, {}))


def loss_of(objective: Objective, logps: Inputs) -> Tensor:
    loss_B: Tensor = objective.function(logps, **parameters_for(objective))
    return loss_B


def tensors(logps: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The (B,) fields that are there."""
    for field in fields(logps):
        value = getattr(logps, field.name)
        if field.name.endswith("_B") and value is not None:
            yield field.name, value


def rows(logps: Inputs, index: Any) -> Any:
    """Some of the rows; scalars and totals stay those of the whole."""
    return replace(logps, **{name: value[index] for name, value in tensors(logps)})


def totals_of(logps: PairLogps) -> Totals:
    prompt = logps.prompt_tokens_B
    return Totals(
        pairs=float(len(logps.chosen_B)),
        chosen_tokens=float(logps.chosen_tokens_B.sum()),
        prompt_tokens=0.0 if prompt is None else float(prompt.sum()),
    )


def at_reference(logps: Inputs) -> Any:
    """The same batch with policy = reference: no ratio, no KL, no z_0, no delta."""
    if isinstance(logps, UnpairedLogps):
        zero = torch.zeros((), dtype=torch.float64)
        return replace(logps, policy_B=logps.ref_B, kl=zero, baseline=zero)
    return replace(
        logps,
        chosen_B=logps.ref_chosen_B,
        rejected_B=logps.ref_rejected_B,
        chosen_common_B=logps.ref_chosen_common_B,
        rejected_common_B=logps.ref_rejected_common_B,
        chosen_kl_B=torch.zeros_like(logps.chosen_B),
        rejected_kl_B=torch.zeros_like(logps.chosen_B),
    )


def gradients(objective: Objective, logps: Inputs, *names: str, **parameters: float) -> list[Tensor]:
    """Gradient of the summed loss with respect to some fields; zeros where it does not depend on one."""
    leaves = {name: getattr(logps, name).clone().requires_grad_() for name in names}
    loss_B = objective.function(replace(logps, **leaves), **objective.resolve(parameters))
    found = torch.autograd.grad(loss_B.sum(), list(leaves.values()), allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves.values(), found, strict=True)
    ]
