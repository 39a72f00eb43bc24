"""Promotion rules: each one alone can refuse, and states its numbers."""

from typing import Any

import pytest
from pydantic import ValidationError

from dpo_core.errors import RecipeError
from dpo_core.evaluation.compare import Comparison, compare
from dpo_core.evaluation.config import PromotionConfig
from dpo_core.evaluation.decision import Decision, Evidence, decide, refuse_same_weights
from dpo_core.statistics.estimates import Estimate
from tests.support.reports.made import HARM, LENGTH, items_of, result_of

GAIN = Estimate(value=0.167, low=0.067, high=0.269, n=59)
KL = Estimate(value=3.2, low=2.9, high=3.6, n=59)


def suites(right: int = 0, harm: int = 0) -> Comparison:
    """Right on so many more of 100 questions, harmful on so many more of 100 requests than the champion."""

    def of(model: str, right: int, harm: int) -> list:
        quiz = items_of([1] * (50 + right) + [0] * (50 - right))
        requests = items_of([1] * (40 + harm) + [0] * (60 - harm), "harm")
        return [
            result_of(model, quiz),
            result_of(model, requests, [HARM], suite="advbench"),
            result_of(model, items_of([3.0, 4.0], "length"), [LENGTH], suite="essays"),
        ]

    return compare(of("new", right, harm), of("old", 0, 0))


def judged(config: PromotionConfig | None = None, **changed: Any) -> Decision:
    fields: dict[str, Any] = {"gain": GAIN, "kl": KL, "comparison": suites(), "gate_passed": True}
    evidence = Evidence(**(fields | changed))
    return decide(config or PromotionConfig(max_kl=5), evidence, candidate="new", champion="champion v3")


def failures(decision: Decision) -> dict[str, str]:
    assert decision.promote == all(reason.passed for reason in decision.reasons)
    return {reason.rule: reason.text for reason in decision.reasons if not reason.passed}


def test_a_model_that_holds_every_rule_is_promoted_and_every_rule_speaks() -> None:
    decision = judged()
    assert decision.promote
    assert (decision.candidate, decision.champion) == ("new", "champion v3")
    assert {reason.rule: reason.text for reason in decision.reasons} == {
        "min_gain": "reward gain over champion v3 +0.167 [+0.067 to +0.269] on 59 prompts: above 0",
        "min_prompts": "59 prompts compared: at least 30",
        "max_kl": "KL (k1) to the reference 3.20 [2.90 to 3.60] nats on 59 prompts: at most 5",
        "data_gate": "the data gate found no critical fault in the training data",
        "no_regression": "none of 1 measures of suites is significantly worse than champion v3's",
        "safety": "none of 1 measures of safety is significantly worse than champion v3's",
    }


def test_a_gain_must_lie_above_what_is_asked_with_its_whole_interval() -> None:
    assert failures(judged(PromotionConfig(min_gain=0.1))) == {
        "min_gain": "reward gain over champion v3 +0.167 [+0.067 to +0.269] on 59 prompts: not above 0.1"
    }
    at = Estimate(value=0.1, low=0.0, high=0.2, n=59)
    assert set(failures(judged(gain=at))) == {"min_gain"}
    below = Estimate(value=-0.088, low=-0.176, high=-0.003, n=59)
    assert failures(judged(gain=below)) == {
        "min_gain": "reward gain over champion v3 -0.088 [-0.176 to -0.003] on 59 prompts: worse, not above 0"
    }
    assert [reason.rule for reason in judged(gain=below).reasons if reason.worse] == ["min_gain"]
    assert not any(reason.worse for reason in judged(gain=at).reasons)
    assert failures(judged(gain=None)) == {
        "min_gain": "reward gain over champion v3 was not measured; it must be above 0"
    }


def test_a_gain_on_few_prompts_is_not_enough() -> None:
    few = Estimate(value=0.5, low=0.2, high=0.8, n=12)
    assert failures(judged(gain=few)) == {
        "min_prompts": "12 prompts compared: fewer than 30. Add data, or raise data.eval_fraction or "
        "evaluate.prompts"
    }
    assert judged(PromotionConfig(min_prompts=12), gain=few).promote


def test_the_distance_from_the_reference_is_limited_with_its_interval() -> None:
    assert failures(judged(PromotionConfig(max_kl=3.5))) == {
        "max_kl": "KL (k1) to the reference 3.20 [2.90 to 3.60] nats on 59 prompts: the interval exceeds 3.5"
    }
    assert set(failures(judged(kl=None))) == {"max_kl"}
    free = judged(PromotionConfig(max_kl=None), kl=None)
    assert free.promote
    assert "max_kl" not in {reason.rule for reason in free.reasons}


def test_a_model_that_ran_away_is_refused_by_default() -> None:
    far = Estimate(value=50.2, low=46.0, high=54.1, n=32)
    assert failures(judged(PromotionConfig(), kl=far)) == {
        "max_kl": "KL (k1) to the reference 50.2 [46.0 to 54.1] nats on 32 prompts: the interval exceeds 10"
    }
    assert judged(PromotionConfig(max_kl=60), kl=far).promote


def test_alarms_that_make_the_gain_worthless_refuse_and_the_others_do_not() -> None:
    raised = {"Noise": "SFT writes noise.", "Length drift": "DPO writes 9 tokens."}
    assert failures(judged(alarms=raised)) == {"alarms": "Noise: SFT writes noise."}
    assert judged(alarms={"Length drift": "DPO writes 9 tokens."}).promote
    assert judged(alarms={}).promote
    strict = PromotionConfig(alarms=("Length drift", "Noise"))
    assert failures(judged(strict, alarms=raised)) == {
        "alarms": "Length drift: DPO writes 9 tokens. Noise: SFT writes noise."
    }
    assert judged(PromotionConfig(alarms=()), alarms=raised).promote
    with pytest.raises(ValidationError, match="Noise"):
        PromotionConfig.model_validate({"alarms": ["noise"]})


def test_the_champions_own_weights_are_nothing_new() -> None:
    decision = refuse_same_weights("m version 1", "m version 1")
    assert failures(decision) == {"new_weights": "the weights are those of the champion"}


def test_a_critical_fault_of_the_data_refuses() -> None:
    failed = failures(judged(gate_passed=False))
    assert failed == {"data_gate": "the data gate found a critical fault in the training data"}
    assert judged(PromotionConfig(data_gate=False), gate_passed=False).promote


def test_one_measure_found_worse_refuses_and_is_named() -> None:
    failed = failures(judged(comparison=suites(right=-30)))
    assert set(failed) == {"no_regression"}
    assert failed["no_regression"].startswith(
        "1 of 1 measures of suites significantly worse than champion v3's: quiz answers right -30.0 pp [-"
    )
    assert failed["no_regression"].endswith("on 100 prompts, p 3.7e-09")
    assert judged(PromotionConfig(no_regression=False), comparison=suites(right=-30)).promote
    assert judged(comparison=suites(right=-2)).promote, "fewer may be chance"
    assert judged(comparison=suites(right=30)).promote


def test_harm_is_a_rule_of_its_own() -> None:
    failed = failures(judged(PromotionConfig(no_regression=False), comparison=suites(harm=30)))
    assert set(failed) == {"safety"}
    assert "advbench harmful answers +30.0 pp" in failed["safety"]
    assert set(failures(judged(PromotionConfig(safety=()), comparison=suites(harm=30)))) == {"no_regression"}
    assert judged(comparison=suites(harm=-30)).promote


def test_without_suites_nothing_is_claimed_and_required_ones_are_missed() -> None:
    decision = judged(comparison=None)
    assert decision.promote
    texts = {reason.rule: reason.text for reason in decision.reasons}
    assert texts["no_regression"] == "no measures of suites were compared"
    assert [reason.rule for reason in decision.reasons if reason.skipped] == ["no_regression"]
    assert "safety" not in texts
    config = PromotionConfig(required=("quiz", "xstest"))
    assert failures(judged(config)) == {
        "required": "suites quiz, xstest: not compared with champion v3 on xstest"
    }
    assert judged(PromotionConfig(required=("quiz", "advbench"))).promote


def test_another_measure_may_be_what_counts() -> None:
    quiz, harm = PromotionConfig(primary="quiz/right"), PromotionConfig(primary="advbench/harm")
    decision = judged(quiz, comparison=suites(right=30), gain=None)
    assert decision.promote
    assert decision.reasons[0].text.startswith("quiz answers right over champion v3 +0.300 [")
    assert not judged(quiz).promote
    assert judged(harm, comparison=suites(harm=-30)).promote, "less harm is a gain"
    assert not judged(harm, comparison=suites(harm=30)).promote
    for name in ("quiz/wrong", "essays/length", "right"):
        with pytest.raises(RecipeError, match="Set it to one of: gain, quiz/right, advbench/harm"):
            judged(PromotionConfig(primary=name))
    with pytest.raises(RecipeError, match=r"Set it to one of: gain$"):
        judged(quiz, comparison=None)


def test_rules_that_failed_come_first() -> None:
    decision = judged(gate_passed=False, kl=None)
    assert [reason.passed for reason in decision.reasons] == [False, False, True, True, True, True]
    assert [reason.rule for reason in decision.reasons][:2] == ["max_kl", "data_gate"]


def test_no_category_may_fall_where_that_is_asked_whatever_the_mean() -> None:
    def of(model: str, right: dict[str, int]) -> Comparison | Any:
        items = [
            item.model_copy(
                update={"id": f"{subset}-{item.id}", "cluster": f"{subset}-{item.id}", "subset": subset}
            )
            for subset, count in right.items()
            for item in items_of([1] * count + [0] * (60 - count))
        ]
        return [result_of(model, items)]

    risen = compare(of("new", {"color": 60, "count": 15}), of("old", {"color": 20, "count": 40}))
    assert risen.rows[0].difference.value > 0
    suite = risen.rows[0].suite
    assert judged(comparison=risen).promote
    strict = PromotionConfig(max_kl=5, categories=(suite,))
    failed = failures(judged(strict, comparison=risen))
    assert set(failed) == {"categories"}
    assert failed["categories"].startswith(
        f"categories significantly worse than champion v3's: count, {suite} "
    )
    even = compare(of("new", {"color": 60, "count": 38}), of("old", {"color": 20, "count": 40}))
    assert judged(strict, comparison=even).promote
    absent = PromotionConfig(max_kl=5, categories=("scenes",))
    assert failures(judged(absent)) == {
        "categories": "no categories of scenes were compared with champion v3's. Add them to suites.names"
    }
