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
from tests.support.samples import at_reference, few, gradients, pairs_at, rows

BETA = 0.3
seeds = st.integers(0, 10_000)


def margins(*values: float) -> PairLogps:
    """Pairs whose chosen log-ratio is the value and whose rejected one is 0; 4 and 9 tokens."""
    h = torch.tensor(values, dtype=torch.float64)
    zero = torch.zeros_like(h)
    return PairLogps(h, zero, zero, zero, torch.full(h.shape, 4), torch.full(h.shape, 9))


@pytest.mark.parametrize(
    ("name", "parameters", "factor"),
    [
        ("dpo", {}, -BETA / 2),
        ("fdpo_forward_kl", {}, -BETA / 2),
        ("fdpo_js", {}, -BETA / 4),
        ("fdpo_alpha", {"alpha": 0.3}, -BETA / 2),
        ("fdpo_alpha", {"alpha": 1.0}, -BETA / 2),
        ("chi_po", {}, -BETA),
        ("r_dpo", {"alpha": 0.0}, -BETA / 2),
        ("dpop", {"penalty": 50.0}, -BETA / 2),  # the kink of the maximum: slope 0 by choice
        ("tdpo1", {}, -BETA / 2),
        ("tdpo2", {"alpha": 0.7}, -BETA / 2),
        # dL/du at 0 = m'·(1 - ln 2) - ¾ with m' = 1/(4τ)
        ("discopop", {"temperature": 0.5}, BETA * ((1 - math.log(2)) / 2 - 0.75)),
    ],
)
def test_gradient_at_the_reference(name: str, parameters: dict[str, float], factor: float) -> None:
    """Relative to ∇log π(y_w) - ∇log π(y_l)."""
    start = at_reference(pairs_at())
    chosen, rejected = gradients(get(name), start, "chosen_B", "rejected_B", beta=BETA, **parameters)
    assert chosen.tolist() == pytest.approx([factor] * 8, rel=1e-9)
    assert rejected.tolist() == pytest.approx([-factor] * 8, rel=1e-9)


def test_gradient_at_the_reference_of_the_rest() -> None:
    start = at_reference(pairs_at())
    alpha = 0.4
    whole, common = gradients(get("ld_dpo"), start, "chosen_B", "chosen_common_B", beta=BETA, alpha=alpha)
    assert whole.tolist() == pytest.approx([-BETA / 2 * alpha] * 8)
    assert common.tolist() == pytest.approx([-BETA / 2 * (1 - alpha)] * 8)
    chosen, rejected = gradients(get("dpo_norm"), start, "chosen_B", "rejected_B", beta=BETA)
    torch.testing.assert_close(chosen, -BETA / 2 / start.chosen_tokens_B.double())
    torch.testing.assert_close(rejected, BETA / 2 / start.rejected_tokens_B.double())
    # d/du of σ(u)·(log σ(u) - log(1-ε)) + σ(-u)·(log σ(-u) - log ε) at 0 is ¼·log(ε/(1-ε)).
    (chosen,) = gradients(get("exo"), start, "chosen_B", beta=BETA, label_smoothing=0.01)
    assert chosen.tolist() == pytest.approx([BETA / 4 * math.log(0.01 / 0.99)] * 8)


def unchanged(logps: PairLogps) -> PairLogps:
    return logps


def ones(logps: PairLogps) -> PairLogps:
    one = torch.ones(len(logps.chosen_B))
    return replace(logps, chosen_tokens_B=one, rejected_tokens_B=one)


def all_common(logps: PairLogps) -> PairLogps:
    return replace(
        logps,
        chosen_common_B=logps.chosen_B,
        rejected_common_B=logps.rejected_B,
        ref_chosen_common_B=logps.ref_chosen_B,
        ref_rejected_common_B=logps.ref_rejected_B,
    )


SAME_AS_DPO: list[tuple[str, dict[str, float], Callable[[PairLogps], PairLogps]]] = [
    ("cdpo", {"label_smoothing": 0.0}, unchanged),
    ("robust", {"label_smoothing": 0.0}, unchanged),
    ("fdpo_alpha", {"alpha": 1.0}, unchanged),
    ("r_dpo", {"alpha": 0.0}, unchanged),
    ("ld_dpo", {"alpha": 1.0}, unchanged),
    ("dpop", {"penalty": 0.0}, unchanged),
    ("tdpo2", {"alpha": 0.0}, unchanged),
    ("tdpo1", {}, lambda logps: replace(logps, chosen_kl_B=logps.rejected_kl_B)),
    ("dpo_norm", {}, ones),
    ("r_dpo", {"alpha": 0.7}, ones),
    ("ld_dpo", {"alpha": 0.2}, all_common),
    ("cpo", {"nll_weight": 0.0}, lambda logps: replace(logps, ref_rejected_B=logps.ref_chosen_B)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters", "change"), SAME_AS_DPO)
@few
@given(seed=seeds)
def test_reductions_to_dpo(
    name: str, parameters: dict[str, float], change: Callable[[PairLogps], PairLogps], seed: int
) -> None:
    """For every policy, not at the reference only."""
    logps = change(pairs_at(seed=seed))
    objective = get(name)
    losses_B = objective.function(logps, **objective.resolve({"beta": BETA, **parameters}))
    torch.testing.assert_close(losses_B, get("dpo").function(logps, beta=BETA), rtol=1e-9, atol=1e-12)


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


FALLING = [
    *["dpo", "robust", "dpo_norm", "fdpo_forward_kl", "fdpo_js", "fdpo_alpha", "chi_po", "hinge"],
    *["bco_pair", "apo_zero", "dpop", "r_dpo", "tdpo1", "tdpo2", "cpo", "simpo", "orpo", "orpo_full"],
]  # fmt: skip


@pytest.mark.parametrize("name", FALLING)
@few
@given(seed=seeds, step=st.floats(0.01, 5))
def test_a_likelier_chosen_or_a_less_likely_rejected_answer_never_costs(
    name: str, seed: int, step: float
) -> None:
    objective = get(name)
    parameters = objective.resolve({})
    logps = pairs_at(seed=seed)
    # Means per token must stay below 0 for the odds of ORPO.
    logps = replace(logps, chosen_tokens_B=torch.full((8,), 9), rejected_tokens_B=torch.full((8,), 7))
    before = objective.function(logps, **parameters)
    raised = objective.function(replace(logps, chosen_B=logps.chosen_B + step), **parameters)
    lowered = objective.function(replace(logps, rejected_B=logps.rejected_B - step), **parameters)
    assert (raised <= before + 1e-12).all()
    assert (lowered <= before + 1e-12).all()
    assert (raised < before).any() or name == "hinge"


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


def test_dpo_is_indifferent_to_mass_outside_the_data() -> None:
    """Three answers, π_ref = (½, ½, 0), one pair 1 > 2: the loss is log(1 + (b/a)^beta), whatever π(3) is."""
    for a, b in [(0.1, 1e-9), (0.9, 1e-9)]:
        logs = [torch.tensor([math.log(p)], dtype=torch.float64) for p in (a, b, 0.5, 0.5)]
        loss = get("dpo").function(PairLogps(*logs, torch.ones(1), torch.ones(1)), beta=1.0)
        assert loss.item() == pytest.approx(math.log1p(b / a))
        assert loss.item() < 1e-7


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


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.4])
def test_exo_is_zero_where_the_policy_gives_the_labels(epsilon: float) -> None:
    best = math.log((1 - epsilon) / epsilon) / BETA
    below, at, above = get("exo").function(
        margins(best - 1, best, best + 1), beta=BETA, label_smoothing=epsilon
    )
    assert at.item() == pytest.approx(0, abs=1e-12)
    assert min(below.item(), above.item()) > 1e-6


def test_discopop_is_exponential_for_right_and_logistic_for_wrong_pairs() -> None:
    right, wrong = get("discopop").function(margins(30.0, -30.0), beta=0.1, temperature=0.05)
    assert right.item() == pytest.approx(math.exp(-3))
    assert wrong.item() == pytest.approx(math.log1p(math.exp(3)))


def test_dpop_asks_only_for_what_was_lost() -> None:
    logps = margins(2.0, -2.0)
    losses_B = get("dpop").function(logps, beta=0.1, penalty=5.0)
    assert losses_B.tolist() == pytest.approx([math.log1p(math.exp(-0.2)), math.log1p(math.exp(1.2))])
    (chosen,) = gradients(get("dpop"), margins(-2.0), "chosen_B", beta=0.1, penalty=5.0)
    assert chosen.item() == pytest.approx(-0.1 * 6 / (1 + math.exp(-1.2)))


def test_r_dpo_asks_less_margin_of_a_longer_chosen_answer() -> None:
    """4 chosen and 9 rejected tokens: α·(4 - 9) is taken off the margin of a SHORTER chosen answer."""
    shorter = margins(0.0)
    longer = replace(shorter, chosen_tokens_B=torch.tensor([9]), rejected_tokens_B=torch.tensor([4]))
    assert get("r_dpo").function(shorter, beta=BETA, alpha=0.2).item() == pytest.approx(math.log1p(math.e))
    assert get("r_dpo").function(longer, beta=BETA, alpha=0.2).item() == pytest.approx(math.log1p(1 / math.e))


def test_ld_dpo_without_the_tail_sees_only_the_common_tokens() -> None:
    logps = pairs_at()
    moved = replace(logps, chosen_B=logps.chosen_B + 3, ref_rejected_B=logps.ref_rejected_B - 2)
    function = get("ld_dpo").function
    torch.testing.assert_close(function(moved, beta=BETA, alpha=0.0), function(logps, beta=BETA, alpha=0.0))
    assert not torch.allclose(function(moved, beta=BETA, alpha=0.1), function(logps, beta=BETA, alpha=0.1))


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
