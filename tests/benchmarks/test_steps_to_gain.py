"""Steps to a gain, on made curves."""

import numpy as np
import pytest

from tests.benchmarks.steps_to_gain import speed_ups, steps_to

STEPS = (10, 20, 40)


def test_the_step_is_read_from_the_line_between_two_points() -> None:
    curve = np.array([0.1, 0.3, 0.2])
    assert steps_to(0.2, curve, STEPS) == pytest.approx(15)
    assert steps_to(0.05, curve, STEPS) == pytest.approx(5)
    assert steps_to(0.31, curve, STEPS) is None


def test_a_method_of_twice_the_speed_is_found_and_no_gain_has_no_ratio() -> None:
    rng = np.random.default_rng(0)
    size = rng.uniform(0.5, 1.5, (200, 1))
    slow, fast = size * np.array([0.1, 0.2, 0.4]), size * np.array([0.2, 0.4, 0.4])
    noise = rng.normal(0, 0.01, (200, 3))
    found = speed_ups({0.0: slow, 0.5: fast, 1.0: noise - 1}, STEPS)
    half = found[0.5, 0.5]
    assert half is not None
    assert half.value == pytest.approx(2)
    assert half.low <= 2 <= half.high
    assert found[1.0, 0.5] is None
