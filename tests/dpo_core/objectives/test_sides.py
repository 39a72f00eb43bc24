"""Objectives that score each side separately, that have no reference, and weighted sums of objectives."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.errors import RecipeError
from dpo_core.objectives import PairLogps, Term, combine, get, pair_metrics, wpo_weights
from dpo_core.objectives.common import log1mexp
from tests.support.samples import few, gradients, pairs_at, rows, totals_of

BETA = 0.3
LN_2 = math.log(2)


def pair(chosen: float, rejected: float, n_chosen: int = 4, n_rejected: int = 9) -> PairLogps:
    """One pair with reference 0."""
    one = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, 0.0, 0.0)]
    return PairLogps(*one, torch.tensor([n_chosen]), torch.tensor([n_rejected]))


class TestReferenceFree:
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


class TestTokenLevel:
    def test_only_tdpo2_stops_the_gradient_and_only_of_the_chosen_kl(self) -> None:
        fields = ("chosen_kl_B", "rejected_kl_B")
        for name in ("tdpo1", "tdpo2"):
            chosen, rejected = gradients(get(name), pairs_at(), *fields, beta=BETA)
            assert (rejected > 0).all()
            assert (chosen < 0).all() if name == "tdpo1" else (chosen == 0).all()

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
