"""Validation of studies, and best of n against every subset."""

import math
from itertools import combinations

import numpy as np
import pytest

from dpo_core.study import Study, best_of_n
from tests.support.reports.studies import point, study


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rewards_PS = np.random.default_rng(0).normal(size=(3, 6))
    rewards_PS[0, :3] = 0.5  # ties
    for best in best_of_n(rewards_PS, [1, 2, 4, 6]):
        for row, found in zip(rewards_PS, best.rewards_P, strict=True):
            subsets = [max(chosen) for chosen in combinations(row, best.n)]
            assert found == pytest.approx(sum(subsets) / len(subsets), rel=1e-12)


def test_best_of_one_is_the_mean_and_best_of_all_the_maximum() -> None:
    one, every = best_of_n([[3.0, 1.0, 2.0], [0.0, 0.0, 9.0]], [1, 3])
    assert one.rewards_P == pytest.approx([2.0, 3.0])
    assert every.rewards_P == pytest.approx([3.0, 9.0])


def test_the_bound_on_the_kl_of_best_of_n() -> None:
    bounds = [best.kl_bound for best in best_of_n([[1.0, 2.0, 3.0, 4.0]], [1, 2, 4])]
    assert bounds == pytest.approx([0.0, math.log(2) - 0.5, 0.636], abs=5e-4)


def test_a_study_survives_json() -> None:
    made = study([point("DPO", "beta=0.1", 0), point("PPO", "kl=6", 1)])
    assert Study.model_validate_json(made.model_dump_json()) == made


def test_policies_keep_their_order_and_the_drawn_ones_are_chosen() -> None:
    points = [point(policy, "beta=0.1", seed) for seed in (0, 1) for policy in ("PPO", "DPO", "DPO, few")]
    assert study(points).drawn_policies() == study(points).policies() == ["PPO", "DPO", "DPO, few"]
    chosen = study(points, drawn=["DPO", "PPO"])
    assert chosen.drawn_policies() == ["DPO", "PPO"], "as the recipe lists them"
    assert chosen.policies() == ["DPO", "PPO", "DPO, few"]
    assert (chosen.base, study(points).base, study([]).base) == ("DPO", "PPO", "")


def test_areas_end_at_the_largest_fixed_kl_unless_told() -> None:
    assert study([], kl_at=[1.0, 4.0]).kl_end == 4.0
    assert study([], kl_at=[1.0, 4.0], kl_max=3.0).kl_end == 3.0
