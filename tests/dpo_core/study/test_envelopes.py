"""Envelopes: hand-made shapes, and the vectorised form against the plain one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.study.envelopes import XY, areas, envelope, rewards_at

SHAPE: list[XY] = [(4.0, 3.0), (1.0, 2.0), (2.0, 1.0), (6.0, 2.5), (3.0, 2.4)]


def envelope_at(points: list[XY], kl: float, reference: float) -> float:
    corners = envelope(points, reference)
    return float(np.interp(kl, [x for x, _ in corners], [y for _, y in corners]))


def area(points: list[XY], kl_max: float, reference: float) -> float:
    x_RK, y_RK = (np.array([[p[i] for p in points]], dtype=float) for i in (0, 1))
    return float(areas(x_RK, y_RK, np.array([reference]), kl_max)[0])


def test_corners_skip_what_lies_below_a_chord_and_what_falls() -> None:
    # (2, 1) is under the hull, (3, 2.4) under the chord from (1, 2) to (4, 3), (6, 2.5) is past the top.
    assert envelope(SHAPE, 0.5) == [(0.0, 0.5), (1.0, 2.0), (4.0, 3.0)]


def test_height_between_at_and_beyond_the_corners() -> None:
    heights = [envelope_at(SHAPE, kl, 0.5) for kl in (0.0, 0.5, 1.0, 2.5, 4.0, 50.0)]
    assert heights == pytest.approx([0.5, 1.25, 2.0, 2.5, 3.0, 3.0])


def test_area_reads_as_a_mean_gain() -> None:
    # Above 0.5: a triangle 1 x 1.5, a trapezoid of 1.5 and 2.5 over 3, a rectangle of 2.5 over 4.
    assert area(SHAPE, 8.0, 0.5) == pytest.approx((0.75 + 6.0 + 10.0) / 8)
    # Cut inside the trapezoid, at height 2 above the reference.
    assert area(SHAPE, 2.5, 0.5) == pytest.approx((0.75 + 1.5 * (1.5 + 2.0) / 2) / 2.5)
    assert area([(2.0, 1.0)], 2.0, 0.0) == 0.5


def test_an_policy_below_the_reference_offers_the_reference() -> None:
    assert envelope([(1.0, -1.0)], 0.0) == [(0.0, 0.0)]
    assert area([(1.0, -1.0)], 4.0, 0.0) == 0.0
    assert envelope_at([], 3.0, 0.25) == 0.25
    assert area([], 4.0, 0.25) == 0.0


def test_a_negative_kl_counts_as_zero() -> None:
    assert envelope([(-0.2, 0.3), (1.0, 0.8)], 0.0) == [(0.0, 0.3), (1.0, 0.8)]
    assert envelope_at([(-0.2, 0.3), (1.0, 0.8)], 0.0, 0.0) == 0.3
    assert area([(-0.2, 0.3)], 2.0, 0.0) == pytest.approx(0.3)


def test_points_at_one_kl_leave_the_best() -> None:
    assert envelope([(1.0, 0.3), (1.0, 0.8), (1.0, 0.5)], 0.0) == [(0.0, 0.0), (1.0, 0.8)]


numbers = st.floats(-2, 8, allow_nan=False).map(lambda v: round(v, 3))
clouds = st.lists(st.tuples(numbers, numbers), min_size=0, max_size=7)


@given(points=clouds, reference=numbers, kl=st.floats(0, 10))
def test_all_resamples_at_once_agree_with_one(points: list[XY], reference: float, kl: float) -> None:
    x_RK, y_RK = (np.array([[p[i] for p in points]] * 2, dtype=float) for i in (0, 1))
    reference_R = np.array([reference, reference])
    expected = envelope_at(points, kl, reference)
    assert rewards_at(x_RK, y_RK, reference_R, kl) == pytest.approx([expected] * 2, abs=1e-9)
    grid = np.linspace(0, 5, 5001)
    heights = np.array([envelope_at(points, x, reference) for x in grid[::50]])
    assert (np.diff(heights) >= -1e-9).all()
    assert (np.diff(heights, 2)[1:] <= 1e-9).all()  # concave; the first step may leave a point at KL 0
    dense = np.interp(grid, *zip(*envelope(points, reference), strict=True))
    by_hand = float(((dense[1:] + dense[:-1]) / 2).mean()) - reference
    assert areas(x_RK, y_RK, reference_R, 5.0) == pytest.approx([by_hand] * 2, abs=0.01)
    assert area(points, 5.0, reference) == pytest.approx(by_hand, abs=0.01)


@given(points=clouds, reference=numbers)
def test_no_point_lies_above_the_envelope(points: list[XY], reference: float) -> None:
    for kl, reward in points:
        assert envelope_at(points, max(0.0, kl), reference) >= reward - 1e-9
