"""Suites of a study: settings chosen by the reward on other prompts, gains over items and seeds, claims."""

import numpy as np
import pytest

from dpo_core.study import Study, claims, summarise
from tests.support.reports.studies import point, study

ITEMS = 200
RNG = np.random.default_rng(0)
REFERENCE = RNG.random(ITEMS) * 0.2 + 0.2


def made(dpo: float, grpo: float, seeds: int = 3) -> Study:
    """DPO's better setting is the first by its reward, and the second by its scores."""
    points = []
    for seed in range(seeds):
        noise = RNG.normal(0, 0.01, ITEMS)
        for policy, setting, reward, score in (
            ("DPO", "beta=0.1", 0.9, dpo),
            ("DPO", "beta=1", 0.5, dpo + 0.3),
            ("GRPO", "kl=0.01", 0.9, grpo),
        ):
            one = point(policy, setting, seed, reward=reward)
            values = (REFERENCE + score + noise + 0.01 * seed).tolist()
            points.append(one.model_copy(update={"suites": {"scenes": values, "scenes_gen": values}}))
    base = REFERENCE.tolist()
    return study(points).model_copy(update={"suites": {"scenes": base, "scenes_gen": base}})


def test_the_setting_is_chosen_by_its_reward_and_not_by_the_suite() -> None:
    summary = summarise(made(0.1, 0.2))
    row = next(row for row in summary.suites if (row.suite, row.policy) == ("scenes", "DPO"))
    assert row.setting == "beta=0.1"
    assert row.gain.value == pytest.approx(0.11, abs=0.005)
    assert row.gain.low > 0.09
    assert (row.seed_gains.low, row.seed_gains.high) == pytest.approx((0.1, 0.12), abs=0.005)
    assert row.score.n == ITEMS


@pytest.mark.parametrize(
    ("dpo", "grpo", "seeds", "verdicts"),
    [
        (0.4, 0.1, 3, ["supported", "contradicted"]),
        (0.1, 0.4, 3, ["contradicted", "supported"]),
        (0.1, 0.4, 2, ["undecided", "undecided"]),
    ],
)
def test_the_two_claims_on_domains_are_judged(
    dpo: float, grpo: float, seeds: int, verdicts: list[str]
) -> None:
    one = made(dpo, grpo, seeds)
    judged = [
        c for c in claims(one, summarise(one)) if c.claim.endswith("of domain") or "in domain" in c.claim
    ]
    assert [claim.verdict for claim in judged] == verdicts
    assert [claim.claimed for claim in judged] == ["+11.53%", "+2.42%"]


def test_a_study_of_text_says_nothing_of_suites() -> None:
    one = study([point("DPO", "beta=0.1", 0), point("GRPO", "kl=0.01", 0)])
    summary = summarise(one)
    assert summary.suites == summary.suite_differences == []
    assert "suites" not in summary.model_dump() | one.model_dump()
    assert not [claim for claim in claims(one, summary) if "domain" in claim.claim]
