"""Closed forms of objectives on the margin: divergences, EXO, DiscoPOP, regularised DPO, transport."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_core.objectives import PairLogps, get, names
from tests.support.samples import few, gradients, pairs_at, rows

BETA = 0.3
seeds = st.integers(0, 10_000)


def margins(*values: float) -> PairLogps:
    """Pairs whose chosen log-ratio is the value and whose rejected one is 0; 4 and 9 tokens."""
    h = torch.tensor(values, dtype=torch.float64)
    zero = torch.zeros_like(h)
    return PairLogps(h, zero, zero, zero, torch.full(h.shape, 4), torch.full(h.shape, 9))


def test_alpha_divergence_between_its_ends() -> None:
    logps = pairs_at(32)
    alpha = get("fdpo_alpha").function
    at_0 = alpha(logps, beta=BETA, alpha=0.0)
    torch.testing.assert_close(at_0, get("fdpo_forward_kl").function(logps, beta=BETA))
    # The -1 in the score keeps float32's digits: without it two numbers near 1e5 would be subtracted.
    ratios = torch.tensor([0.7, -0.3, 2.0])
    narrow = PairLogps(ratios, -ratios, *torch.zeros(2, 3), torch.ones(3), torch.ones(3))
    near_1 = alpha(narrow, beta=BETA, alpha=1 - 1e-5)
    torch.testing.assert_close(near_1, get("dpo").function(narrow, beta=BETA), rtol=1e-4, atol=0)


def fit_scores(name: str, rewards: Tensor, reference: Tensor, **parameters: float) -> Tensor:
    """Log-ratios h of each answer after minimising the loss over all pairs with Bradley-Terry frequencies."""
    objective = get(name)
    i, j = torch.cartesian_prod(torch.arange(len(rewards)), torch.arange(len(rewards))).T
    frequency = torch.sigmoid(rewards[i] - rewards[j])
    logits = reference.log().clone().requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16,
                               line_search_fn="strong_wolfe")  # fmt: skip
    n = torch.ones(len(i))

    def closure() -> Tensor:
        solver.zero_grad()
        policy, ref = logits.log_softmax(0), reference.log()
        loss_B = objective.function(PairLogps(policy[i], policy[j], ref[i], ref[j], n, n), **parameters)
        loss = (frequency * loss_B).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return (logits.log_softmax(0) - reference.log()).detach()


@pytest.mark.parametrize(
    ("name", "parameters", "score"),
    [
        ("dpo", {}, lambda h: h),
        ("fdpo_forward_kl", {}, lambda h: -(-h).exp()),
        ("fdpo_js", {}, lambda h: (2 * h.exp() / (1 + h.exp())).log()),
        ("fdpo_alpha", {"alpha": 0.5}, lambda h: -2 * (-h / 2).exp()),
        ("chi_po", {"r_max": 100.0}, lambda h: h.exp() + h),
        ("kl_plus", {"c": 0.5}, lambda h: h + 0.5 * h.exp()),
    ],
)
def test_infinite_data_recovers_the_reward_up_to_a_constant(
    name: str, parameters: dict[str, float], score: Callable[[Tensor], Tensor]
) -> None:
    """The theory: beta·f'(π/π_ref) = reward + constant at the optimum, f' of the divergence in question."""
    rewards = torch.tensor([0.0, 0.4, -0.3, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    h = fit_scores(name, rewards, reference, beta=0.7, **parameters)
    constant = 0.7 * score(h) - rewards
    torch.testing.assert_close(constant, constant[:1].expand(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 4.0])
def test_kl_plus_ends_at_the_best_policy_under_its_regulariser(c: float) -> None:
    """The policy that maximises E r - beta·(KL + c/2·χ²), found without any pair."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(25, generator=generator, dtype=torch.float64)
    reference = torch.randn(25, generator=generator, dtype=torch.float64).softmax(0)
    logits = reference.log().clone().requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        solver.zero_grad()
        policy = logits.softmax(0)
        chi_squared = ((policy - reference) ** 2 / reference).sum()
        kl = (policy * (policy / reference).log()).sum()
        loss = BETA * (kl + c / 2 * chi_squared) - (policy * rewards).sum()
        loss.backward()
        return loss

    solver.step(closure)
    h = fit_scores("kl_plus", rewards, reference, beta=BETA, c=c)
    torch.testing.assert_close(reference * h.exp(), logits.softmax(0).detach(), rtol=0, atol=3e-5)


def test_kl_plus_is_dpo_at_zero_and_chi_po_at_one() -> None:
    logps = pairs_at(32)
    for name, parameters, c in (("dpo", {}, 0.0), ("chi_po", {"r_max": 1000.0}, 1.0)):
        wanted = get(name).function(logps, beta=BETA, **parameters)
        torch.testing.assert_close(get("kl_plus").function(logps, beta=BETA, c=c), wanted)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(name, {}) for name in names() if get(name).data == "pairs" and not get(name).extras]
    + [("fdpo_alpha", {"alpha": 0.0}), ("fdpo_alpha", {"alpha": 0.999}), ("fdpo_forward_kl", {"beta": 10.0})],
)
@pytest.mark.parametrize("lost", [10.0, 31.0, 60.0, 100.0, 500.0])
def test_a_gradient_to_be_clipped_has_a_norm(name: str, parameters: dict[str, float], lost: float) -> None:
    """In float32, whatever a completion lost: the sum of squares over weights that count thousandfold."""
    chosen, rejected = (torch.tensor([-x, -x - 1, 0.0, x]).requires_grad_() for x in (lost + 20.0, 25.0))
    zeros = torch.zeros(4)
    logps = PairLogps(chosen, rejected, zeros - 20, zeros - 20, zeros + 9, zeros + 4)
    loss = get(name).function(logps, **get(name).resolve(parameters)).sum()
    loss.backward()
    squares = sum((1e3 * side.grad).square().sum() for side in (chosen, rejected) if side.grad is not None)
    assert loss.isfinite()
    assert torch.as_tensor(squares).isfinite()


@pytest.mark.parametrize(("name", "parameters"), [("fdpo_forward_kl", {}), ("fdpo_alpha", {"alpha": 0.5})])
def test_exponentials_continue_as_tangents(name: str, parameters: dict[str, float]) -> None:
    """A completion that lost very much is still drawn back, and harder than one that lost less."""
    logps = margins(-10.0, -29.0, -100.0, -300.0)
    (chosen,) = gradients(get(name), logps, "chosen_B", beta=BETA, **parameters)
    rate = 1 - parameters.get("alpha", 0.0)
    wanted = [-BETA * math.exp(min(rate * lost, 30)) for lost in (10, 29, 100, 300)]
    assert chosen.tolist() == pytest.approx(wanted, rel=1e-6)


def test_chi_po_is_clipped_on_both_sides() -> None:
    logps = margins(-50.0, 0.0, 50.0)
    loss = get("chi_po").function(logps, beta=1.0, r_max=2.0)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(4)), math.log(2), math.log1p(math.exp(-4))])
    (chosen,) = gradients(get("chi_po"), logps, "chosen_B", beta=1.0, r_max=2.0)
    assert chosen.tolist() == pytest.approx([0.0, -1.0, 0.0])


class TestTransport:
    def test_paired_aot_compares_margins_of_equal_rank(self) -> None:
        logps = PairLogps(
            *(torch.tensor(v, dtype=torch.float64) for v in ([3.0, 1.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0])),
            torch.ones(2),
            torch.ones(2),
        )
        # Policy margins 3, 1 and reference margins 0, ½: ranks 1 - 0 and 3 - ½.
        losses_B = get("aot").function(logps, beta=1.0, label_smoothing=0.0)
        assert losses_B.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(-2.5))])

    def test_unpaired_aot_does_not_depend_on_the_pairing(self) -> None:
        logps = pairs_at(16)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        shuffled = replace(
            logps, rejected_B=logps.rejected_B[order], ref_rejected_B=logps.ref_rejected_B[order]
        )
        functions = {name: get(name).function for name in ("aot_unpaired", "aot", "dpo")}
        smooth = {"aot_unpaired": {"label_smoothing": 0.1}, "aot": {"label_smoothing": 0.1}, "dpo": {}}
        means = {
            name: [function(x, beta=BETA, **smooth[name]).mean().item() for x in (logps, shuffled)]
            for name, function in functions.items()
        }
        assert means["aot_unpaired"][0] == pytest.approx(means["aot_unpaired"][1], rel=1e-12)
        assert means["aot"][0] != pytest.approx(means["aot"][1], rel=1e-6)
        assert means["dpo"][0] != pytest.approx(means["dpo"][1], rel=1e-6)

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    @few
    @given(seed=seeds)
    def test_the_mean_is_that_of_sorted_numbers_in_any_order(self, name: str, seed: int) -> None:
        logps = pairs_at(6, seed)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        mean = get(name).function(rows(logps, order), beta=BETA, label_smoothing=0.1).mean().item()
        v = {key: getattr(logps, f"{key}_B").tolist() for key in ("chosen", "rejected")}
        r = {key: getattr(logps, f"ref_{key}_B").tolist() for key in ("chosen", "rejected")}
        if name == "aot":
            left = sorted(a - b for a, b in zip(v["chosen"], v["rejected"], strict=True))
            right = sorted(a - b for a, b in zip(r["chosen"], r["rejected"], strict=True))
        else:
            left, right = (sorted(a - b for a, b in zip(v[k], r[k], strict=True)) for k in v)
        us = [BETA * (a - b) for a, b in zip(left, right, strict=True)]
        losses = [0.9 * math.log1p(math.exp(-u)) + 0.1 * math.log1p(math.exp(u)) for u in us]
        assert mean == pytest.approx(sum(losses) / 6, rel=1e-9)

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    def test_order_does_not_matter_and_splitting_does(self, name: str) -> None:
        assert get(name).batch_coupled
        logps = pairs_at(16)
        parameters = {"beta": BETA, "label_smoothing": 0.0}
        whole = get(name).function(logps, **parameters).mean().item()
        order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
        assert get(name).function(rows(logps, order), **parameters).mean().item() == pytest.approx(whole)
        halves = [get(name).function(rows(logps, cut), **parameters) for cut in (slice(8), slice(8, 16))]
        assert torch.cat(halves).mean().item() != pytest.approx(whole, rel=1e-6)
