"""Objectives that score each side separately, that have no reference, and weighted sums of objectives."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_core.errors import RecipeError
from dpo_core.objectives import PairLogps, Term, Totals, combine, get, pair_metrics, wpo_weights
from dpo_core.objectives.common import log1mexp
from tests.support.samples import at_reference, few, gradients, pairs_at, rows, totals_of

BETA = 0.3
LN_2 = math.log(2)


def pair(chosen: float, rejected: float, n_chosen: int = 4, n_rejected: int = 9) -> PairLogps:
    """One pair with reference 0."""
    one = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, 0.0, 0.0)]
    return PairLogps(*one, torch.tensor([n_chosen]), torch.tensor([n_rejected]))


@pytest.mark.parametrize(
    ("name", "chosen_factor", "rejected_factor"),
    [
        ("nca", -BETA / 4, BETA / 4),
        ("bco_pair", -BETA / 2, BETA / 2),
        ("sppo_hard", -1 / BETA, 1 / BETA),
        ("apo_zero", -BETA / 4, BETA / 4),
        ("apo_down", 0.0, BETA / 4),
    ],
)
def test_gradient_at_the_reference(name: str, chosen_factor: float, rejected_factor: float) -> None:
    start = at_reference(pairs_at())
    chosen, rejected = gradients(get(name), start, "chosen_B", "rejected_B", beta=BETA)
    assert chosen.tolist() == pytest.approx([chosen_factor] * 8, abs=1e-12)
    assert rejected.tolist() == pytest.approx([rejected_factor] * 8, rel=1e-9)


def test_nca_is_best_at_two_thirds() -> None:
    best = LN_2 / BETA  # σ(ln 2) = 2/3
    (chosen,) = gradients(get("nca"), pair(best, 0.0), "chosen_B", beta=BETA)
    assert chosen.item() == pytest.approx(0, abs=1e-12)
    before, after = (
        gradients(get("nca"), pair(h, 0.0), "chosen_B", beta=BETA)[0] for h in (best - 1, best + 1)
    )
    assert before < 0 < after


def test_sppo_draws_each_side_to_its_own_target() -> None:
    target = 1 / (2 * BETA)
    assert get("sppo_hard").function(pair(target, -target), beta=BETA).item() == 0.0
    (chosen,) = gradients(get("sppo_hard"), pair(target + 1, 0.0), "chosen_B", beta=BETA)
    assert chosen.item() == pytest.approx(2)


def test_apo_zero_raises_the_chosen_side_and_apo_down_lowers_it() -> None:
    """For a pair that is in order already."""
    logps = pair(3.0, -3.0)
    (zero,) = gradients(get("apo_zero"), logps, "chosen_B", beta=BETA)
    (down,) = gradients(get("apo_down"), logps, "chosen_B", beta=BETA)
    assert zero < 0 < down


class TestReferenceFree:
    def test_cpo_with_equal_log_probs_is_ln_2_and_the_nll(self) -> None:
        loss = get("cpo").function(pair(-8.0, -8.0), beta=BETA, nll_weight=0.5, label_smoothing=0.0)
        assert loss.item() == pytest.approx(LN_2 + 0.5 * 8 / 4)

    @few
    @given(ratio=st.floats(0, 2), mean=st.floats(-5, -0.01))
    def test_simpo_with_equal_means_is_softplus_of_gamma(self, ratio: float, mean: float) -> None:
        loss = get("simpo").function(pair(4 * mean, 9 * mean), beta=2.5, gamma_beta_ratio=ratio)
        gamma = 2.5 * ratio
        assert loss.item() == pytest.approx(math.log1p(math.exp(gamma)))

    def test_simpo_gives_a_repeated_completion_the_same_reward(self) -> None:
        once, twice = pair(-8.0, -12.0), pair(-16.0, -12.0, n_chosen=8)
        function = get("simpo").function
        parameters = {"beta": 2.0, "gamma_beta_ratio": 0.5}
        assert function(once, **parameters).item() == pytest.approx(function(twice, **parameters).item())

    def test_simpo_without_a_margin_is_antisymmetric(self) -> None:
        forth, back = (
            get("simpo").function(x, beta=2.0, gamma_beta_ratio=0.0)
            for x in (pair(-4.0, -18.0), pair(-18.0, -4.0, 9, 4))
        )
        assert (forth - back).item() == pytest.approx(-2.0 * (-1 + 2))

    @few
    @given(mean=st.floats(-8, -0.001), weight=st.floats(0, 2))
    def test_orpo_with_equal_means_is_the_nll_and_ln_2(self, mean: float, weight: float) -> None:
        loss = get("orpo").function(pair(4 * mean, 9 * mean), odds_weight=weight)
        assert loss.item() == pytest.approx(-mean + weight * LN_2)

    def test_orpo_without_odds_is_sft(self) -> None:
        logps = pairs_at()
        loss_B = get("orpo").function(logps, odds_weight=0.0)
        torch.testing.assert_close(loss_B, get("sft").function(logps))

    def test_the_two_orpos_differ_by_the_prompt_only(self) -> None:
        logps = pairs_at()
        nothing = torch.zeros(8, dtype=torch.float64)
        without = replace(logps, prompt_B=nothing, prompt_tokens_B=nothing.int())
        full, short = get("orpo_full").function, get("orpo").function
        torch.testing.assert_close(full(without, odds_weight=0.2), short(logps, odds_weight=0.2))
        tokens = logps.prompt_tokens_B.sum() + logps.chosen_tokens_B.sum()
        nll = -(logps.prompt_B.sum() + logps.chosen_B.sum()) / tokens
        assert full(logps, odds_weight=0.0).mean().item() == pytest.approx(nll.item())

    def test_orpo_next_to_certainty(self) -> None:
        """Means between 0 and -1e-7 are cut: finite odds, and no gradient through them."""
        logps = replace(pair(-1e-9, -9.0), chosen_B=torch.zeros(1), rejected_B=torch.tensor([-9.0]))
        loss = get("orpo").function(logps, odds_weight=1.0)
        assert loss.isfinite().all()
        (chosen,) = gradients(get("orpo"), logps, "chosen_B", odds_weight=1.0)
        assert chosen.item() == pytest.approx(-1 / 4)  # the NLL's alone

    @few
    @given(x=st.one_of(st.floats(-60, -1e-7), st.floats(-1e-3, -1e-7)))
    def test_log1mexp_in_float32(self, x: float) -> None:
        """Against float64, where either of the two forms alone loses digits."""
        x32 = torch.tensor(x, dtype=torch.float32)
        exact = math.log(-math.expm1(x32.item())) if x > -1 else math.log1p(-math.exp(x32.item()))
        assert log1mexp(x32).item() == pytest.approx(exact, rel=1e-5, abs=1e-30)


class TestTokenMeans:
    """The NLL is one mean over the tokens of the global batch, however it is cut."""

    @pytest.mark.parametrize("name", ["sft", "cpo", "orpo", "orpo_full"])
    def test_micro_batches_add_up(self, name: str) -> None:
        objective = get(name)
        parameters = objective.resolve({})
        logps = pairs_at(12)
        whole = objective.function(logps, **parameters).mean()
        cuts = [slice(0, 2), slice(2, 3), slice(3, 12)]
        counted = replace(logps, totals=totals_of(logps))
        split = sum(objective.function(rows(counted, cut), **parameters).sum() for cut in cuts) / 12
        assert split.item() == pytest.approx(whole.item(), rel=1e-12)
        # What it would be if every micro-batch took its own mean.
        local = sum(objective.function(rows(logps, cut), **parameters).sum() for cut in cuts) / 12
        assert local.item() != pytest.approx(whole.item(), rel=1e-3)

    def test_sft_is_log_probs_over_tokens(self) -> None:
        logps = pairs_at()
        nll = -logps.chosen_B.sum() / logps.chosen_tokens_B.sum()
        assert get("sft").function(logps).mean().item() == pytest.approx(nll.item())

    def test_totals_of_a_larger_batch(self) -> None:
        logps = replace(pair(-8.0, -8.0), totals=Totals(pairs=10, chosen_tokens=160, prompt_tokens=0))
        assert get("sft").function(logps).item() == pytest.approx(8 * 10 / 160)


class TestTokenLevel:
    def sides(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reference log-softmax (2, T, V) of two completions, and their tokens (2, T)."""
        g = torch.Generator().manual_seed(seed)
        reference = (2 * torch.randn(2, 5, 7, generator=g, dtype=torch.float64)).log_softmax(-1)
        return reference, torch.randint(0, 7, (2, 5), generator=g), torch.randn(
            2, 5, 7, generator=g, dtype=torch.float64
        )  # fmt: skip

    def logps(self, logits: Tensor, reference: Tensor, tokens: Tensor) -> PairLogps:
        policy = logits.log_softmax(-1)
        chosen, rejected = policy.gather(-1, tokens[..., None]).sum((1, 2))
        ref_chosen, ref_rejected = reference.gather(-1, tokens[..., None]).sum((1, 2))
        k_chosen, k_rejected = (reference.exp() * (reference - policy)).sum((1, 2))
        five = torch.tensor([5])
        sums = [x[None] for x in (chosen, rejected, ref_chosen, ref_rejected)]
        return PairLogps(*sums, five, five, chosen_kl_B=k_chosen[None], rejected_kl_B=k_rejected[None])

    @pytest.mark.parametrize(("name", "more"), [("tdpo1", {}), ("tdpo2", {"alpha": 0.8})])
    def test_the_first_gradient_is_dpos(self, name: str, more: dict[str, float]) -> None:
        """Through real distributions: K and its gradient are 0 at the reference, and not away from it."""
        reference, tokens, noise = self.sides(0)

        def gradient(of: str, at: Tensor, **parameters: float) -> Tensor:
            logits = at.clone().requires_grad_()
            get(of).function(self.logps(logits, reference, tokens), **parameters).sum().backward()
            assert logits.grad is not None
            return logits.grad

        first = gradient(name, reference, beta=BETA, **more)
        torch.testing.assert_close(first, gradient("dpo", reference, beta=BETA), rtol=1e-9, atol=1e-12)
        later = gradient(name, reference + noise, beta=BETA, **more)
        assert not torch.allclose(later, gradient("dpo", reference + noise, beta=BETA), atol=1e-3)

    def test_only_tdpo2_stops_the_gradient_and_only_of_the_chosen_kl(self) -> None:
        fields = ("chosen_kl_B", "rejected_kl_B")
        for name in ("tdpo1", "tdpo2"):
            chosen, rejected = gradients(get(name), pairs_at(), *fields, beta=BETA)
            assert (rejected > 0).all()
            assert (chosen < 0).all() if name == "tdpo1" else (chosen == 0).all()

    def test_the_chosen_kl_still_counts_in_the_value_of_tdpo2(self) -> None:
        logps = pairs_at()
        more = replace(logps, chosen_kl_B=logps.chosen_kl_B + 1)
        function = get("tdpo2").function
        assert (function(more, beta=BETA, alpha=0.5) < function(logps, beta=BETA, alpha=0.5)).all()

    def test_a_live_reference_is_required(self) -> None:
        assert get("tdpo1").needs_full_vocabulary
        assert get("tdpo2").needs() == ["pairs", "live reference"]
        assert not get("dpo").needs_full_vocabulary

    def test_rewards_carry_the_kl(self) -> None:
        logps = pairs_at()
        metrics = pair_metrics(logps, 0.5)
        wanted = 0.5 * (logps.chosen_ratio_B + logps.chosen_kl_B)
        torch.testing.assert_close(metrics["rewards/chosen"], wanted)
        plain = pair_metrics(replace(logps, chosen_kl_B=None, rejected_kl_B=None), 0.5)
        torch.testing.assert_close(plain["rewards/rejected"], 0.5 * logps.rejected_ratio_B)


class TestWeightedSums:
    @few
    @given(seed=st.integers(0, 10_000), weights=st.tuples(*[st.floats(0.001, 10)] * 3))
    def test_mixed_preference_optimisation(self, seed: int, weights: tuple[float, float, float]) -> None:
        logps = pairs_at(seed=seed)
        terms = [
            Term("dpo", weights[0], {"beta": BETA}),
            Term("bco_pair", weights[1], {"beta": BETA}),
            Term("sft", weights[2], {}),
        ]
        by_hand = (
            weights[0] * get("dpo").function(logps, beta=BETA)
            + weights[1] * get("bco_pair").function(logps, beta=BETA)
            + weights[2] * get("sft").function(logps)
        )
        torch.testing.assert_close(combine(terms, logps), by_hand, rtol=1e-12, atol=0)

    def test_a_sum_of_one_is_the_objective_and_of_none_an_error(self) -> None:
        logps = pairs_at()
        alone = combine([Term("dpo", 1.0, {"beta": BETA})], logps)
        torch.testing.assert_close(alone, get("dpo").function(logps, beta=BETA), rtol=0, atol=0)
        with pytest.raises(ValueError, match="at least one term"):
            combine([], logps)
        with pytest.raises(RecipeError, match="no objective 'dop'"):
            combine([Term("dop", 1.0, {})], logps)


def test_wpo_weights_are_what_they_should_be_and_carry_no_gradient() -> None:
    """The weight is 1 for a policy uniform over v tokens, whose sharpness is log(1/v) - log(v·1/v²) = 0."""
    nothing, sharp = torch.zeros(2), torch.tensor([-0.5, 0.25], requires_grad=True)
    logps = replace(
        rows(pairs_at(), slice(2)), chosen_sharpness_B=sharp, rejected_sharpness_B=torch.tensor([-0.5, 0.0])
    )
    weights = wpo_weights(logps)
    assert weights.tolist() == pytest.approx([math.exp(-1), math.exp(0.25)])
    assert not weights.requires_grad
    uniform = replace(logps, chosen_sharpness_B=nothing, rejected_sharpness_B=nothing)
    assert wpo_weights(uniform).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="rejected_sharpness_B is missing"):
        wpo_weights(replace(logps, rejected_sharpness_B=None))


@few
@given(chosen=st.floats(-20, 3), rejected=st.floats(-20, 3), shift=st.floats(0, 3))
def test_wpo_weights_grow_with_how_likely_the_policy_writes_either_side(
    chosen: float, rejected: float, shift: float
) -> None:
    def weight(*means: float) -> float:
        sides = [torch.tensor([x], dtype=torch.float64) for x in means]
        logps = rows(pairs_at(), slice(1))
        return wpo_weights(replace(logps, chosen_sharpness_B=sides[0], rejected_sharpness_B=sides[1])).item()

    start = weight(chosen, rejected)
    assert start == pytest.approx(weight(rejected, chosen), rel=1e-12)
    assert weight(chosen + shift, rejected) == pytest.approx(start * math.exp(shift), rel=1e-9)


def test_rewards_per_token_as_simpo_logs_them() -> None:
    logps = pair(-8.0, -9.0)
    metrics = pair_metrics(replace(logps, ref_chosen_B=logps.chosen_B), 2.0, per_token=True)
    assert metrics["rewards/chosen"].item() == pytest.approx(-4.0)
    assert metrics["rewards/rejected"].item() == pytest.approx(-2.0)
    assert metrics["rewards/accuracies"].item() == 0.0
    assert {name for name in ("simpo", "orpo", "orpo_full", "cpo") if get(name).rewards_per_token} == {
        "simpo",
        "orpo",
        "orpo_full",
    }


def test_optional_fields_are_checked_like_the_others() -> None:
    with pytest.raises(ValueError, match="chosen_kl_B has shape"):
        replace(pairs_at(), chosen_kl_B=torch.zeros(3))
    with pytest.raises(ValueError, match=r"prompt_B is torch\.bfloat16"):
        replace(pairs_at(), prompt_B=torch.zeros(8, dtype=torch.bfloat16))
