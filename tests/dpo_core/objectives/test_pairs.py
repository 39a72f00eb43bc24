"""Closed forms of DPO and its nearest relatives, in float64; see also `test_every_objective`."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_core.objectives import PairLogps, get, pair_metrics
from tests.support.samples import few

BETA, EPSILON, TAU = 0.3, 0.1, 0.1


def pairs(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None = None) -> PairLogps:
    zeros = torch.zeros_like(chosen.detach())
    return PairLogps(
        chosen_B=chosen,
        rejected_B=rejected,
        ref_chosen_B=zeros if ref_chosen is None else ref_chosen,
        ref_rejected_B=zeros,
        chosen_tokens_B=torch.full(chosen.shape, 4),
        rejected_tokens_B=torch.full(chosen.shape, 9),
    )


def random_pairs(n: int = 16, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    sums = [-30 + 3 * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(4)]
    tokens = [torch.randint(1, 20, (n,), generator=generator) for _ in range(2)]
    return PairLogps(*sums, *tokens)


def of_margin(name: str, margin: Tensor, **parameters: float) -> Tensor:
    """The loss as a function of D (with the policy moved on the chosen side only)."""
    objective = get(name)
    return objective.function(
        pairs(margin, torch.zeros_like(margin.detach())), **objective.resolve(parameters)
    )


def slope(name: str, margin: float, **parameters: float) -> float:
    d = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    of_margin(name, d, **parameters).sum().backward()
    assert d.grad is not None
    return d.grad.item()


@pytest.mark.parametrize(
    ("name", "parameters", "factor"),
    [
        ("dpo", {"beta": BETA}, -BETA / 2),
        ("cdpo", {"beta": BETA, "label_smoothing": EPSILON}, -BETA * (0.5 - EPSILON)),
        ("robust", {"beta": BETA, "label_smoothing": EPSILON}, -BETA / (2 * (1 - 2 * EPSILON))),
        ("ipo_sum", {"tau": TAU}, -1 / TAU),
        ("hinge", {"beta": BETA}, -BETA),
    ],
)
def test_gradient_at_the_reference(name: str, parameters: dict[str, float], factor: float) -> None:
    chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    get(name).function(pairs(chosen, rejected), **parameters).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(factor, rel=1e-12)
    assert rejected.grad.item() == pytest.approx(-factor, rel=1e-12)


def test_ipo_mean_gradient_at_the_reference_divides_each_side_by_its_own_tokens() -> None:
    chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    get("ipo_mean").function(pairs(chosen, rejected), tau=TAU).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-1 / TAU / 4)
    assert rejected.grad.item() == pytest.approx(1 / TAU / 9)


def test_dpo_gradient_away_from_the_reference() -> None:
    d = 1.7
    assert slope("dpo", d, beta=BETA) == pytest.approx(-BETA / (1 + math.exp(BETA * d)), rel=1e-12)


def test_hand_computed_values_with_all_four_log_probs() -> None:
    def one(x: float) -> Tensor:
        return torch.tensor([x], dtype=torch.float64)

    logps = PairLogps(one(-10.0), one(-14.0), one(-12.0), one(-13.0), torch.tensor([4]), torch.tensor([5]))
    # h_w = 2, h_l = -1, D = 3
    assert get("dpo").function(logps, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert get("ipo_sum").function(logps, tau=0.25).item() == pytest.approx(1.0)
    assert get("ipo_mean").function(logps, tau=0.25).item() == pytest.approx((0.5 + 0.2 - 2.0) ** 2)
    assert get("hinge").function(logps, beta=0.25).item() == pytest.approx(0.25)


@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.35])
def test_cdpo_optimum_is_the_log_odds_and_its_value_the_entropy(epsilon: float) -> None:
    best = math.log((1 - epsilon) / epsilon) / BETA
    entropy = -epsilon * math.log(epsilon) - (1 - epsilon) * math.log(1 - epsilon)
    assert slope("cdpo", best, beta=BETA, label_smoothing=epsilon) == pytest.approx(0, abs=1e-12)
    around = torch.tensor([best - 0.5, best, best + 0.5], dtype=torch.float64)
    below, at, above = of_margin("cdpo", around, beta=BETA, label_smoothing=epsilon).tolist()
    assert at == pytest.approx(entropy, rel=1e-12)
    assert below > at < above


def test_cdpo_limits() -> None:
    assert slope("cdpo", 0.0, beta=BETA, label_smoothing=0.5) == pytest.approx(0, abs=1e-15)
    d = torch.linspace(-20, 20, 41, dtype=torch.float64)
    torch.testing.assert_close(
        of_margin("cdpo", d, beta=BETA, label_smoothing=0.0), of_margin("dpo", d, beta=BETA)
    )


def test_ipo_optimum_and_reversed_gradient_past_it() -> None:
    target = 1 / (2 * TAU)
    assert of_margin("ipo_sum", torch.tensor([target], dtype=torch.float64), tau=TAU).item() == 0.0
    assert slope("ipo_sum", target, tau=TAU) == 0.0
    assert slope("ipo_sum", target - 1, tau=TAU) == pytest.approx(-2)
    assert slope("ipo_sum", target + 1, tau=TAU) == pytest.approx(2)


def test_ipo_variants_agree_when_every_completion_is_one_token() -> None:
    logps = replace(random_pairs(), chosen_tokens_B=torch.ones(16), rejected_tokens_B=torch.ones(16))
    torch.testing.assert_close(
        get("ipo_mean").function(logps, tau=TAU), get("ipo_sum").function(logps, tau=TAU), rtol=0, atol=0
    )


def test_hinge_has_no_gradient_on_satisfied_pairs() -> None:
    assert slope("hinge", 1 / BETA + 0.1, beta=BETA) == 0.0
    assert slope("hinge", 1 / BETA - 0.1, beta=BETA) == pytest.approx(-BETA)


@few
@given(margin=st.floats(-40, 40), epsilon=st.floats(0, 0.45))
def test_robust_expectation_over_flips_is_the_clean_loss(margin: float, epsilon: float) -> None:
    d = torch.tensor([margin, -margin], dtype=torch.float64)
    kept, flipped = of_margin("robust", d, beta=BETA, label_smoothing=epsilon).tolist()
    clean = of_margin("dpo", d, beta=BETA)[0].item()
    assert (1 - epsilon) * kept + epsilon * flipped == pytest.approx(clean, rel=1e-9, abs=1e-9)


def test_robust_is_unbiased_under_simulated_flips_and_dpo_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = 2.0 + torch.randn(200_000, generator=generator, dtype=torch.float64)
    flip = torch.rand(clean.shape, generator=generator) < 0.2
    noisy = torch.where(flip, -clean, clean)
    wanted = of_margin("dpo", clean, beta=1.0).mean().item()
    estimates = of_margin("robust", noisy, beta=1.0, label_smoothing=0.2)
    standard_error = estimates.std().item() / math.sqrt(clean.numel())
    assert abs(estimates.mean().item() - wanted) < 4 * standard_error
    assert of_margin("dpo", noisy, beta=1.0).mean().item() - wanted > 100 * standard_error


def test_robust_never_saturates() -> None:
    assert slope("robust", 500.0, beta=1.0, label_smoothing=0.2) == pytest.approx(-0.2 / 0.6, rel=1e-12)
    assert of_margin("robust", torch.tensor([500.0]), beta=1.0, label_smoothing=0.2).item() < -100


@pytest.mark.parametrize("name", ["dpo", "robust", "cdpo"])
@few
@given(margin=st.floats(-300, 300), beta=st.floats(0.01, 5))
def test_swapping_the_pair(name: str, margin: float, beta: float) -> None:
    """L(D) - L(-D) = -beta·D for DPO; (1-2ε) times that for cDPO; 1/(1-2ε) times it for robust."""
    objective = get(name)
    parameters = objective.resolve({"beta": beta})
    logps = pairs(torch.tensor([margin], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    swapped = replace(logps, chosen_B=logps.rejected_B, rejected_B=logps.chosen_B)
    difference = (objective.function(logps, **parameters) - objective.function(swapped, **parameters)).item()
    epsilon = parameters.get("label_smoothing", 0.0)
    factor = {"dpo": 1.0, "cdpo": 1 - 2 * epsilon, "robust": 1 / (1 - 2 * epsilon)}[name]
    assert difference == pytest.approx(-factor * beta * margin, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "ipo_sum", "hinge"])
@few
@given(shift=st.floats(-500, 500), seed=st.integers(0, 1000))
def test_a_constant_per_prompt_changes_nothing(name: str, shift: float, seed: int) -> None:
    objective = get(name)
    parameters = objective.resolve({})
    logps = random_pairs(seed=seed)
    moved = replace(logps, chosen_B=logps.chosen_B + shift, rejected_B=logps.rejected_B + shift)
    before, after = objective.function(logps, **parameters), objective.function(moved, **parameters)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_identical_completions_give_ln_2_and_no_gradient_for_any_policy() -> None:
    policy = torch.tensor([-3.0, -700.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-9.0, -5.0], dtype=torch.float64)
    logps = replace(pairs(policy, policy, ref), ref_rejected_B=ref)
    loss_B = get("dpo").function(logps, beta=BETA)
    loss_B.sum().backward()
    assert loss_B.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-12)
    assert policy.grad is not None
    assert policy.grad.tolist() == [0.0, 0.0]


def test_metrics() -> None:
    chosen = torch.tensor([-10.0, -10.0, -10.0], dtype=torch.float64, requires_grad=True)
    logps = pairs(chosen, torch.tensor([-14.0, -10.0, -9.0], dtype=torch.float64))
    metrics = pair_metrics(logps, beta=0.5)
    assert {key: value.tolist() for key, value in metrics.items()} == {
        "rewards/chosen": [-5.0, -5.0, -5.0],
        "rewards/rejected": [-7.0, -5.0, -4.5],
        "rewards/margins": [2.0, 0.0, -0.5],
        "rewards/accuracies": [1.0, 0.0, 0.0],  # a tie counts 0
        "logps/chosen": [-10.0, -10.0, -10.0],
        "logps/rejected": [-14.0, -10.0, -9.0],
    }
    assert not any(value.requires_grad for value in metrics.values())


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="ref_chosen_B has shape"):
        pairs(torch.zeros(3), torch.zeros(3), ref_chosen=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="rejected_B has shape"):
        pairs(torch.zeros(3), torch.zeros(1))


def test_narrow_log_probs_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        pairs(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3))
