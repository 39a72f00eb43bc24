"""KTO and BCO: closed forms, z_0 and delta, and the metrics by class."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.objectives import UnpairedLogps, class_means, get, unpaired_metrics, z0
from tests.support.samples import at_reference, few, rows, unpaired_at

BETA = 0.3


def examples(*ratios: float, desirable: list[bool], kl: float = 0.0, baseline: float = 0.0) -> UnpairedLogps:
    h = torch.tensor(ratios, dtype=torch.float64)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (kl, baseline)]
    return UnpairedLogps(h, torch.zeros_like(h), torch.full(h.shape, 5), torch.tensor(desirable), *scalars)


def kto(logps: UnpairedLogps, **given_parameters: float) -> Any:
    objective = get("kto")
    return objective.function(logps, **objective.resolve({"beta": BETA, **given_parameters}))


def test_kto_at_the_reference_is_half_of_each_weight() -> None:
    loss_B = kto(at_reference(unpaired_at()), desirable_weight=1.5, undesirable_weight=0.8)
    assert loss_B.tolist() == pytest.approx([0.75, 0.4] * 4)
    value = get("kto").value_at_reference
    assert value is not None
    assert value({"desirable_weight": 3.0, "undesirable_weight": 3.0}) == 1.5
    assert value({"desirable_weight": 3.0, "undesirable_weight": 1.0}) is None


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_is_fine(label: bool) -> None:
    logps = examples(1.0, 2.0, desirable=[label, label])
    for name in ("kto", "bco"):
        objective = get(name)
        loss_B = objective.function(logps, **objective.resolve({}))
        assert loss_B.isfinite().all()
    metrics = unpaired_metrics(logps, BETA)
    means = class_means({key: value.sum().item() for key, value in metrics.items()})
    there, missing = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert means[f"rewards/{there}"] == pytest.approx(BETA * 1.5)
    assert f"rewards/{missing}" not in means
    assert "rewards/margins" not in means


@few
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12), st.integers(1, 11))
def test_z0_is_clamped_once_over_all_ranks(ratios: list[float], cut: int) -> None:
    h = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    point = z0(h.sum(), len(ratios))
    assert point.item() == pytest.approx(max(0.0, sum(ratios) / len(ratios)), abs=1e-12)
    assert point.ndim == 0
    assert not point.requires_grad
    # Sums of two ranks give the same; a mean of clamped parts would not.
    parts = h[:cut].sum() + h[cut:].sum()
    assert z0(parts, torch.tensor(len(ratios))).item() == pytest.approx(point.item(), abs=1e-9)


def test_metrics_by_class() -> None:
    logps = examples(2.0, -1.0, 4.0, desirable=[True, False, True])
    logps = replace(logps, ref_B=logps.ref_B - 1, policy_B=logps.policy_B.clone().requires_grad_())
    metrics = unpaired_metrics(logps, 0.5)
    assert {key: value.tolist() for key, value in metrics.items()} == {
        "rewards/chosen": [1.5, 0.0, 2.5],
        "rewards/rejected": [0.0, 0.0, 0.0],
        "logps/chosen": [2.0, 0.0, 4.0],
        "logps/rejected": [0.0, -1.0, 0.0],
        "count/chosen": [1.0, 0.0, 1.0],
        "count/rejected": [0.0, 1.0, 0.0],
    }
    assert not any(value.requires_grad for value in metrics.values())
    sums = {key: value.sum().item() for key, value in metrics.items()}
    assert class_means(sums) == {
        "rewards/chosen": 2.0,
        "rewards/rejected": 0.0,
        "logps/chosen": 3.0,
        "logps/rejected": -1.0,
        "rewards/margins": 2.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": torch.tensor(1.0, requires_grad=True)}, "kl must be one number"),
        ({"baseline": torch.zeros(8)}, "baseline must be one number"),
        ({"desirable_B": torch.ones(8)}, "not booleans"),
        ({"ref_B": torch.zeros(1)}, "ref_B has shape"),
        ({"policy_B": torch.zeros(8, dtype=torch.float16)}, r"policy_B is torch\.float16"),
    ],
)
def test_inputs_that_would_train_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(unpaired_at(), **change)


def test_the_coupled_scalar_has_to_be_there() -> None:
    with pytest.raises(ValueError, match="kl is missing"):
        kto(replace(unpaired_at(), kl=None))
    with pytest.raises(ValueError, match="baseline is missing"):
        get("bco").function(replace(unpaired_at(), baseline=None), beta=BETA)
    # Neither reads the other's.
    assert kto(replace(rows(unpaired_at(), slice(3)), baseline=None)).shape == (3,)
