"""Summaries of constructed studies: measured values, intervals and pairing."""

import numpy as np
import pytest

from dpo_core.study import PolicyCost, Study, best_of_n, summarise
from dpo_core.study.bootstrap import Resampling
from dpo_core.study.results import SettingRow
from tests.support.reports.studies import PROMPTS, noisy, point, study

CURVE = {"beta=0.05": (6.0, 0.9), "beta=0.1": (3.0, 0.7), "beta=0.5": (1.2, 0.45), "beta=1": (0.5, 0.25)}
LOWER = {setting: (kl, reward - 0.15) for setting, (kl, reward) in CURVE.items()}


def _row(made: Study, policy: str, setting: str) -> SettingRow:
    return next(row for row in summarise(made).settings if (row.policy, row.setting) == (policy, setting))


def test_a_setting_is_the_mean_of_its_seeds() -> None:
    points = [
        point("DPO", "beta=0.1", 4, reward=0.4, kl=1.0, flops=2e12, entropy=1.0, shared_cost={"pairs": 2e11}),
        point("DPO", "beta=0.1", 2, reward=0.8, kl=2.0, flops=4e12, entropy=2.0,
              cost=PolicyCost(flops=4e12, seconds=100.0)),
    ]  # fmt: skip
    row = _row(study(points), "DPO", "beta=0.1")
    assert row.seeds == [2, 4]
    assert (row.reward.value, row.kl.value, row.entropy) == pytest.approx((0.6, 1.5, 1.5))
    assert (row.seed_rewards.low, row.seed_rewards.high, row.seed_rewards.seeds) == pytest.approx(
        (0.4, 0.8, 2)
    )
    assert row.cost == PolicyCost(flops=3e12, seconds=80.0, peak_memory_bytes=2**30)
    assert row.shared_cost == {"pairs": 1e11}
    # Prompts do not differ here, so that only the seeds speak: one of the two is drawn each time.
    assert (row.reward.low, row.reward.high) == pytest.approx((0.4, 0.8))
    assert row.reward.n == PROMPTS


def test_the_order_is_that_of_the_study() -> None:
    points = [point(policy, setting, 0) for setting in ("beta=1", "beta=0.1") for policy in ("PPO", "DPO")]
    rows = [(row.policy, row.setting) for row in summarise(study(points)).settings]
    assert rows == [("PPO", "beta=1"), ("PPO", "beta=0.1"), ("DPO", "beta=1"), ("DPO", "beta=0.1")]


def test_policies_offer_the_envelope_of_their_settings_not_of_their_runs() -> None:
    points = [
        *(point("DPO", "beta=0.1", seed, kl=2.0, reward=reward) for seed, reward in ((0, 0.2), (1, 0.6))),
        point("DPO", "beta=1", 0, kl=-0.1, reward=0.1),
        point("PPO", "kl=3", 0, kl=3.0, reward=0.9),
    ]
    made = study(points, kl_at=[1.0, 3.0])
    summary = summarise(made)
    row = summary.policy("DPO")
    assert row
    assert np.ravel(row.envelope) == pytest.approx([0.0, 0.1, 2.0, 0.4])
    assert row.area.value == pytest.approx(0.9 / 3)
    assert [at.reward.value for at in row.at_kl] == pytest.approx([0.25, 0.4])
    assert [at.reached for at in row.at_kl] == [True, False]
    assert (row.settings, row.seeds, row.fewest_seeds) == (2, [0, 1], 1)
    assert row.reach == pytest.approx(2.0)
    difference = summary.difference("PPO", "DPO")
    assert difference
    assert difference.area.value == pytest.approx((1.35 - 0.9) / 3)
    assert difference.common_kl == pytest.approx(2.0)
    assert difference.common_area
    assert difference.common_area.value == pytest.approx((0.6 - 0.5) / 2)
    assert [at.reached for at in difference.at_kl] == [True, False]


def test_a_difference_turned_round_changes_its_signs() -> None:
    summary = summarise(noisy({"DPO": CURVE, "PPO": LOWER}))
    ours, theirs = summary.difference("DPO", "PPO"), summary.difference("PPO", "DPO")
    assert ours
    assert theirs
    assert (ours.area.low, ours.area.high) == (-theirs.area.high, -theirs.area.low)
    assert ours.at_kl[0].reward.value == -theirs.at_kl[0].reward.value
    assert theirs.area.high < 0 < ours.area.low
    assert summary.difference("DPO", "GRPO") is None


def test_resampling_is_paired_over_prompts_and_seeds() -> None:
    """Two policies that share their prompts' and seeds' luck differ by a constant: the interval sees it."""
    rng = np.random.default_rng(1)
    prompt_P, seed_S = rng.normal(size=PROMPTS), rng.normal(size=4)
    points = [
        point(policy, "beta=0.1", seed, rewards_P=(prompt_P + seed_S[seed] + shift).tolist())
        for policy, shift in (("DPO", 0.3), ("PPO", 0.0))
        for seed in range(4)
    ]
    summary = summarise(study(points, reference_rewards_P=(prompt_P - 5).tolist()))
    difference = summary.difference("DPO", "PPO")
    assert difference
    reward = difference.at_kl[0].reward
    assert (reward.low, reward.high) == pytest.approx((0.3, 0.3))
    ours = summary.rows("DPO")[0].reward
    assert ours.high - ours.low > 0.5


def test_the_interval_grows_with_the_seeds_as_their_mean_varies() -> None:
    """Of n seeds n-1 are drawn: the spread of the resampled mean is the standard error of the mean."""
    values = [0.0, 0.3, 0.9]
    points = [point("DPO", "beta=0.1", seed, reward=value) for seed, value in enumerate(values)]
    reward_R = Resampling(study(points, resamples=20_000)).reward_R["DPO", "beta=0.1"][1:]
    assert reward_R.std() == pytest.approx(np.std(values, ddof=1) / 3**0.5, rel=0.02)


def test_a_study_without_points_has_empty_tables() -> None:
    best = best_of_n(np.tile([0.0, 1.0], (PROMPTS, 1)), [1, 2])
    summary = summarise(study([], best_of=best))
    assert (summary.settings, summary.policies, summary.differences, summary.compute) == ([], [], [], [])
    assert [row.gain.value for row in summary.best_of] == pytest.approx([0.5, 1.0])


def test_compute_at_the_gain_that_both_reach() -> None:
    points = [
        *(point("DPO", f"beta={i}", seed, reward=r, flops=f)
          for i, (r, f) in enumerate([(0.5, 1e12), (0.8, 2e12), (1.2, 9e12)]) for seed in (0, 1)),
        *(point("PPO", f"kl={i}", seed, reward=r, flops=f)
          for i, (r, f) in enumerate([(0.35, 3e12), (0.8, 8e12)]) for seed in (0, 1)),
    ]  # fmt: skip
    half, most = summarise(study(points)).compute
    assert (half.gain_share, most.gain_share) == (0.5, 0.9)
    # Both reach 0.8: half of it, 0.4, costs 1e12 against 8e12; 90 % costs 2e12 against 8e12.
    assert (half.flops, half.other_flops, half.reward) == pytest.approx((1e12, 8e12, 0.4))
    assert (most.flops, most.other_flops, most.reward) == pytest.approx((2e12, 8e12, 0.72))
    assert most.ratio
    assert (most.ratio.value, most.ratio.low, most.ratio.high, most.defined) == (0.25, 0.25, 0.25, 1.0)


def test_compute_where_a_policy_gains_nothing() -> None:
    points = [point("DPO", "beta=0.1", 0, reward=0.5), point("PPO", "kl=3", 0, reward=-0.1)]
    for row in summarise(study(points)).compute:
        assert (row.ratio, row.flops, row.defined) == (None, None, 0.0)


def test_the_share_of_resamples_in_which_a_ratio_exists() -> None:
    rng = np.random.default_rng(2)
    barely = (0.1 + rng.normal(0, 1.0, PROMPTS)).tolist()
    points = [point("DPO", "beta=0.1", 0, reward=0.5), point("PPO", "kl=3", 0, rewards_P=barely)]
    row = summarise(study(points)).compute[0]
    if row.ratio is None:
        pytest.fail("the mean gain is above 0 in these data")
    assert 0.5 < row.defined < 0.95


def test_diversity_is_paired_by_seed_at_the_same_beta() -> None:
    points = [
        *(point("DPO", "beta=0.10", seed, entropy=2.0 + seed, distinct_1=0.0) for seed in range(3)),
        point("DPO", "beta=1", 0),
        *(point("TDPO2", "beta=0.1, alpha=0.5", seed, entropy=3.0 + seed) for seed in (1, 2, 7)),
        point("TDPO2", "beta=5", 0),
    ]  # fmt: skip
    rows = summarise(study(points)).diversity
    assert [(row.setting, row.metric) for row in rows] == [
        ("beta=0.1, alpha=0.5", "entropy"), ("beta=0.1, alpha=0.5", "distinct_2"),
    ]  # fmt: skip
    relative = rows[0].relative  # seeds 1 and 2: 4/3 and 5/4
    assert (relative.low, relative.high, relative.seeds) == pytest.approx((0.25, 1 / 3, 2))


def test_a_beta_that_two_settings_share_is_matched_by_the_whole_setting_only() -> None:
    points = [point("DPO", f"beta=0.1, steps={steps}", 0) for steps in (100, 200)]
    tdpo = [point("TDPO1", setting, 0) for setting in ("beta=0.1", "beta=0.1, steps=200")]
    rows = summarise(study([*points, *tdpo])).diversity
    assert {row.setting for row in rows} == {"beta=0.1, steps=200"}


def test_intervals_cover_the_truth_and_see_a_dominated_policy() -> None:
    studies, covered, found = 60, 0, []
    for data_seed in range(studies):
        summary = summarise(noisy({"DPO": CURVE, "PPO": LOWER}, data_seed=data_seed))
        gain = summary.settings[0].gain
        covered += gain.low <= 0.9 <= gain.high
        difference = summary.difference("DPO", "PPO")
        assert difference
        found.append(difference.area.low > 0)
    assert covered / studies >= 0.88
    assert np.mean(found) >= 0.95


def test_equal_policies_are_seldom_told_apart() -> None:
    decided = 0
    for data_seed in range(60):
        difference = summarise(noisy({"DPO": CURVE, "PPO": CURVE}, data_seed=data_seed)).differences[0]
        decided += not difference.area.low <= 0 <= difference.area.high
    assert decided <= 9


def test_intervals_at_fixed_kls_widen_with_their_number() -> None:
    """They hold together, so that the one that tells the most may be pointed at."""

    def width(kl_at: list[float]) -> float:
        made = noisy({"DPO": CURVE, "PPO": LOWER}, resamples=4000, kl_at=kl_at)
        reward = summarise(made).differences[0].at_kl[0].reward
        return reward.high - reward.low

    # Normal quantiles: 2.576 for five at 95 % together, 1.960 for one.
    assert width([1.0, 2.0, 3.0, 4.0, 5.0]) / width([1.0]) == pytest.approx(2.576 / 1.960, rel=0.08)
