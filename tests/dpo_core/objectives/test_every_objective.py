"""Properties of every registered objective; a new one without an entry in the tables fails here."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_core.objectives import get, names
from tests.support.samples import (
    EXTRAS,
    at_reference,
    few,
    inputs_for,
    loss_of,
    parameters_for,
    rows,
    tensors,
    totals_of,
)

LN_2 = math.log(2)


def softplus(x: float) -> float:
    """-log σ(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigma(x: float) -> float:
    return math.exp(-softplus(-x))


def cdpo(u: float, e: float) -> float:
    return (1 - e) * softplus(-u) + e * softplus(u)


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


# A second writing of every formula, for one pair or example, in plain numbers. v holds the inputs' fields
# without their suffix, h and D; T = mean chosen tokens, TP = mean chosen and prompt tokens of the batch.
FORMULAS: dict[str, Callable[[Any, Any], float]] = {
    "dpo": lambda v, p: softplus(-p.beta * v.D),
    "cdpo": lambda v, p: cdpo(p.beta * v.D, p.label_smoothing),
    "robust": lambda v, p: (
        ((1 - p.label_smoothing) * softplus(-p.beta * v.D) - p.label_smoothing * softplus(p.beta * v.D))
        / (1 - 2 * p.label_smoothing)
    ),
    "ipo_sum": lambda v, p: (v.D - 1 / (2 * p.tau)) ** 2,
    "ipo_mean": lambda v, p: (v.hw / v.chosen_tokens - v.hl / v.rejected_tokens - 1 / (2 * p.tau)) ** 2,
    "hinge": lambda v, p: max(0, 1 - p.beta * v.D),
    "dpo_norm": lambda v, p: softplus(-p.beta * (v.hw / v.chosen_tokens - v.hl / v.rejected_tokens)),
    "exo": lambda v, p: (
        sigma(p.beta * v.D) * math.log(sigma(p.beta * v.D) / (1 - p.label_smoothing))
        + sigma(-p.beta * v.D) * math.log(sigma(-p.beta * v.D) / p.label_smoothing)
    ),
    "discopop": lambda v, p: (
        (1 - sigma(p.beta * v.D / p.temperature)) * softplus(-p.beta * v.D)
        + sigma(p.beta * v.D / p.temperature) * math.exp(-p.beta * v.D)
    ),
    "fdpo_forward_kl": lambda v, p: softplus(-p.beta * (math.exp(-v.hl) - math.exp(-v.hw))),
    "fdpo_js": lambda v, p: softplus(-p.beta * (math.log(sigma(v.hw)) - math.log(sigma(v.hl)))),
    "fdpo_alpha": lambda v, p: softplus(
        -p.beta * (math.exp((p.alpha - 1) * v.hw) - math.exp((p.alpha - 1) * v.hl)) / (p.alpha - 1)
    ),
    "chi_po": lambda v, p: softplus(
        -min(max(p.beta * (math.exp(v.hw) + v.D - math.exp(v.hl)), -2 * p.r_max), 2 * p.r_max)
    ),
    "kl_plus": lambda v, p: softplus(-p.beta * (v.D + p.c * (math.exp(v.hw) - math.exp(v.hl)))),
    "nca": lambda v, p: softplus(-p.beta * v.hw) + (softplus(p.beta * v.hw) + softplus(p.beta * v.hl)) / 2,
    "bco_pair": lambda v, p: softplus(-p.beta * v.hw) + softplus(p.beta * v.hl),
    "sppo_hard": lambda v, p: (v.hw - 0.5 / p.beta) ** 2 + (v.hl + 0.5 / p.beta) ** 2,
    "apo_zero": lambda v, p: 1 - sigma(p.beta * v.hw) + sigma(p.beta * v.hl),
    "apo_down": lambda v, p: sigma(p.beta * v.hw) + 1 - sigma(p.beta * v.D),
    "dpop": lambda v, p: softplus(-p.beta * (v.D - p.penalty * max(0, -v.hw))),
    "r_dpo": lambda v, p: softplus(-(p.beta * v.D + p.alpha * (v.chosen_tokens - v.rejected_tokens))),
    "ld_dpo": lambda v, p: softplus(
        -p.beta
        * (
            (v.chosen_common + p.alpha * (v.chosen - v.chosen_common))
            - (v.ref_chosen_common + p.alpha * (v.ref_chosen - v.ref_chosen_common))
            - (v.rejected_common + p.alpha * (v.rejected - v.rejected_common))
            + (v.ref_rejected_common + p.alpha * (v.ref_rejected - v.ref_rejected_common))
        )
    ),
    "sft": lambda v, p: -v.chosen / v.T,
    "sft_mean": lambda v, p: -v.chosen / v.chosen_tokens,
    "tdpo1": lambda v, p: softplus(-p.beta * (v.D - (v.rejected_kl - v.chosen_kl))),
    "tdpo2": lambda v, p: softplus(-p.beta * (v.D - p.alpha * (v.rejected_kl - v.chosen_kl))),
    "cpo": lambda v, p: (
        cdpo(p.beta * (v.chosen - v.rejected), p.label_smoothing) - p.nll_weight * v.chosen / v.T
    ),
    "simpo": lambda v, p: softplus(
        -p.beta * (v.chosen / v.chosen_tokens - v.rejected / v.rejected_tokens - p.gamma_beta_ratio)
    ),
    "orpo": lambda v, p: (
        -v.chosen / v.T
        + p.odds_weight
        * math.log(1 + odds(v.rejected / v.rejected_tokens) / odds(v.chosen / v.chosen_tokens))
    ),
    "orpo_full": lambda v, p: (
        -(v.prompt + v.chosen) / v.TP
        + p.odds_weight
        * math.log(1 + odds(v.rejected / v.rejected_tokens) / odds(v.chosen / v.chosen_tokens))
    ),
    "kto": lambda v, p: (
        p.desirable_weight * (1 - sigma(p.beta * (v.h - v.kl)))
        if v.desirable
        else p.undesirable_weight * (1 - sigma(p.beta * (v.kl - v.h)))
    ),
    "bco": lambda v, p: softplus((1 - 2 * v.desirable) * (p.beta * v.h - v.baseline)),
    # One pair is its own rank; the sorting is tested with the family.
    "aot": lambda v, p: cdpo(p.beta * v.D, p.label_smoothing),
    "aot_unpaired": lambda v, p: cdpo(p.beta * v.D, p.label_smoothing),
}

# The loss at policy = reference with default parameters; None where it depends on the data.
AT_REFERENCE = {
    **dict.fromkeys(
        ["dpo", "cdpo", "robust", "dpo_norm", "fdpo_forward_kl", "fdpo_js", "fdpo_alpha", "chi_po", "dpop"],
        LN_2,
    ),
    **dict.fromkeys(["kl_plus", "ld_dpo", "tdpo1", "tdpo2", "aot", "aot_unpaired", "bco"], LN_2),
    **dict.fromkeys(["hinge", "apo_zero", "apo_down"], 1.0),
    **dict.fromkeys(["nca", "bco_pair"], 2 * LN_2),
    **dict.fromkeys(["ipo_sum", "ipo_mean"], 25.0),
    "sppo_hard": 50.0,
    "exo": 2.761231,  # ½·log(0.5/0.999) + ½·log(0.5/0.001)
    "discopop": 0.846574,  # ½·ln 2 + ½
    "kto": 0.5,
    **dict.fromkeys(["r_dpo", "sft", "sft_mean", "cpo", "simpo", "orpo", "orpo_full"], None),
}

# Fields that hold a log-prob or divergence under the policy, for gradients.
POLICY_FIELDS = [
    *["chosen_B", "rejected_B", "policy_B", "prompt_B"],
    *["chosen_kl_B", "rejected_kl_B", "chosen_common_B", "rejected_common_B"],
]  # fmt: skip
# Where the definition stops the gradient, autograd and finite differences must differ.
STOPPED = {"tdpo2": {"chosen_kl_B"}}

every_objective = pytest.mark.parametrize("name", names())


class Numbers:
    def __init__(self, **values: float) -> None:
        self.__dict__.update(values)


def plain(logps: Any, i: int) -> Numbers:
    v = {key.removesuffix("_B"): value[i].item() for key, value in tensors(logps)}
    if "policy" in v:
        return Numbers(**v, h=v["policy"] - v["ref"], kl=logps.kl.item(), baseline=logps.baseline.item())
    hw, hl = v["chosen"] - v["ref_chosen"], v["rejected"] - v["ref_rejected"]
    chosen_tokens = logps.chosen_tokens_B.double().mean().item()
    return Numbers(
        **v,
        hw=hw,
        hl=hl,
        D=hw - hl,
        T=chosen_tokens,
        TP=chosen_tokens + logps.prompt_tokens_B.double().mean().item(),
    )


def test_the_tables_and_the_registry_name_the_same_objectives() -> None:
    """A family whose file is no longer imported would otherwise vanish unseen."""
    assert set(FORMULAS) == set(AT_REFERENCE) == set(names())


@every_objective
@few
@given(seed=st.integers(0, 10_000), spread=st.floats(0, 4), data=st.data())
def test_the_formula_written_a_second_time(name: str, seed: int, spread: float, data: st.DataObject) -> None:
    """For any batch, and parameters up to halfway from the default to either end of their range."""
    objective = get(name)
    batch = inputs_for(objective, n=4, seed=seed, spread=spread)
    parameters = {
        key: data.draw(st.floats((p.default + p.low) / 2, (p.default + p.high) / 2), label=key)
        for key, p in objective.parameters.items()
    }
    alone = [rows(batch, slice(i, i + 1)) for i in range(4)]  # a pair that is its own rank
    parts = alone if objective.batch_coupled else [batch]
    split_losses = [value for part in parts for value in objective.function(part, **parameters).tolist()]
    wanted = [FORMULAS[name](plain(batch, i), Numbers(**parameters)) for i in range(4)]
    assert split_losses == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@every_objective
def test_value_at_the_reference(name: str) -> None:
    objective = get(name)
    parameters = objective.resolve({})
    loss_B = objective.function(at_reference(inputs_for(objective)), **parameters)
    if AT_REFERENCE[name] is None:
        assert objective.value_at_reference is None
        other_B = objective.function(at_reference(inputs_for(objective, seed=1)), **parameters)
        assert loss_B.mean().item() != pytest.approx(other_B.mean().item(), rel=1e-6)
        return
    assert objective.value_at_reference is not None
    documented = objective.value_at_reference(parameters)
    assert documented == pytest.approx(AT_REFERENCE[name], rel=1e-6)
    assert loss_B.tolist() == pytest.approx([documented] * 8, rel=1e-12)


@every_objective
def test_the_documented_value_follows_the_parameters(name: str) -> None:
    objective = get(name)
    for end in (0, 1):
        # Halfway from the default to either end of the range.
        moved = {k: (p.default + (p.high if end else p.low)) / 2 for k, p in objective.parameters.items()}
        parameters = objective.resolve(moved)
        known = objective.value_at_reference and objective.value_at_reference(parameters)
        if known is not None:
            loss_B = objective.function(at_reference(inputs_for(objective)), **parameters)
            assert loss_B.tolist() == pytest.approx([known] * 8, rel=1e-9)


@every_objective
@pytest.mark.parametrize("seed", [0, 1])
def test_autograd_against_finite_differences(name: str, seed: int) -> None:
    objective = get(name)
    batch = inputs_for(objective, n=4, seed=seed)
    present = [field for field, _ in tensors(batch) if field in POLICY_FIELDS]
    moving = [field for field in present if field not in STOPPED.get(name, set())]

    def loss(*values: Tensor) -> Tensor:
        return loss_of(objective, replace(batch, **dict(zip(moving, values, strict=True))))

    leaves = [getattr(batch, field).clone().requires_grad_() for field in moving]
    assert torch.autograd.gradcheck(loss, leaves)
    grads = torch.autograd.grad(loss(*leaves).sum(), leaves, allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1e-4 for grad in grads), "a loss without gradient"


@every_objective
def test_every_row_is_judged_by_itself(name: str) -> None:
    """Order and split of the batch change no row's loss, totals given.

    Not for objectives that sort over the batch: their docstring says so, and `TestTransport` that it shows.
    """
    objective = get(name)
    if objective.batch_coupled:
        pytest.skip("sorts over the batch; see TestTransport")
    batch = inputs_for(objective, n=12)
    whole_B = loss_of(objective, batch)
    assert whole_B.shape == (12,)
    if objective.data == "pairs":
        batch = replace(batch, totals=totals_of(batch))
        torch.testing.assert_close(loss_of(objective, batch), whole_B, rtol=1e-12, atol=0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss_of(objective, rows(batch, order)), whole_B[order], rtol=1e-12, atol=0)
    pieces = [loss_of(objective, rows(batch, slice(*cut))) for cut in [(0, 1), (1, 5), (5, 12)]]
    torch.testing.assert_close(torch.cat(pieces), whole_B, rtol=1e-12, atol=0)


@every_objective
@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("side", [1, -1])
def test_extreme_log_probs_stay_finite_in_float32(name: str, size: float, side: int) -> None:
    objective = get(name)
    batch = at_reference(inputs_for(objective))
    batch = replace(
        batch, **{key: value.float() for key, value in tensors(batch) if value.is_floating_point()}
    )
    moved = {
        key: (getattr(batch, key) + sign * side * size).requires_grad_()
        for key, sign in {"chosen_B": 1, "rejected_B": -1, "policy_B": 1}.items()
        if hasattr(batch, key)
    }
    loss_B = loss_of(objective, replace(batch, **moved))
    grads = torch.autograd.grad(loss_B.sum(), list(moved.values()), allow_unused=True)
    assert loss_B.isfinite().all()
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@every_objective
def test_the_declared_extras_are_what_is_read(name: str) -> None:
    objective = get(name)
    if objective.data == "unpaired":
        assert not objective.extras
        return
    batch = inputs_for(objective)
    whole_B = loss_of(objective, batch)
    for extra, fields in EXTRAS.items():
        for field in fields:
            without = replace(batch, **{field: None})
            if extra in objective.extras:
                with pytest.raises(ValueError, match=f"{field} is missing"):
                    loss_of(objective, without)
            else:
                torch.testing.assert_close(loss_of(objective, without), whole_B, rtol=0, atol=0)


@every_objective
def test_the_reference_is_read_where_it_is_declared(name: str) -> None:
    objective = get(name)
    batch = inputs_for(objective)
    moved = replace(
        batch,
        **{
            key: value - torch.linspace(0, 3, len(value), dtype=torch.float64)
            for key, value in tensors(batch)
            if key.startswith(("ref_chosen", "ref_B"))
        },
    )
    same = torch.equal(loss_of(objective, moved), loss_of(objective, batch))
    assert same is not objective.needs_reference


@every_objective
def test_every_parameter_moves_the_loss(name: str) -> None:
    objective = get(name)
    batch = inputs_for(objective)
    for key, (_, low, high, _) in objective.parameters.items():
        at_low, at_high = (
            objective.function(batch, **parameters_for(objective) | {key: end}) for end in (low, high)
        )
        assert not torch.allclose(at_low, at_high, rtol=1e-4), key
