"""The variance over rewards, on made scores."""

import numpy as np
import pytest

from tests.benchmarks.reward_variance import variances


def test_the_variance_is_that_of_the_means_over_rewards() -> None:
    rng = np.random.default_rng(0)
    base = rng.binomial(1, 0.5, 400).astype(float)
    by_reward = [
        {"SFT": base.tolist(), "DPO": (base * (1 - step)).tolist(), "GRPO": base.tolist()}
        for step in (0.0, 0.2, 0.4)
    ]
    found = variances(by_reward)
    assert found.keys() == {"DPO", "GRPO", "DPO - GRPO"}
    assert found["DPO"].value == pytest.approx((20 * base.mean()) ** 2)
    assert found["GRPO"].value == 0
    assert found["DPO - GRPO"].low > 0
