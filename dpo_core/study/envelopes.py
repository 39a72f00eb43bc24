"""Envelopes of a policy's points: the best reward for a KL, and the least compute for a reward.

The envelope in the (KL, reward) plane is the non-decreasing concave hull from the reference at (0, its
reward). A mixture that answers each prompt with one of two policies by a biased coin has the mixed reward and
at most the mixed KL, so that every point of the hull can be reached. Compute has no such mixtures: its
envelope is a staircase.

Legend: R resamples, K points of one policy, the reference excepted.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from dpo_core.statistics.estimates import Floats

XY = tuple[float, float]


def envelope(points: Sequence[XY], reference: float) -> list[XY]:
    """Corners of the envelope over (KL, reward) points, from (0, `reference`) to its highest point.

    A negative KL is an estimate of a small KL and counts as 0.
    """
    corners = [(0.0, reference)]
    for point in sorted((max(0.0, kl), reward) for kl, reward in points):
        if point[1] <= corners[-1][1]:
            continue
        corners.append(point)
        while len(corners) > 1 and corners[-2][0] == point[0]:  # directly above the last corner
            del corners[-2]
        while len(corners) > 2 and _below(corners[-2], corners[-3], point):
            del corners[-2]
    return corners


def _below(middle: XY, left: XY, right: XY) -> bool:
    """Whether `middle` is on or below the line between its neighbours."""
    rise, run = right[1] - left[1], right[0] - left[0]
    return (middle[1] - left[1]) * run <= rise * (middle[0] - left[0])


def rewards_at(kl_RK: Floats, reward_RK: Floats, reference_R: Floats, kl: ArrayLike) -> Floats:
    """(R,): each resample's envelope at `kl`, which is one number or one per resample.

    The hull's height: the maximum of all points up to `kl` and of all chords that cross it.
    """
    x_RK, y_RK = _with_reference(kl_RK, reward_RK, reference_R)
    return _height(x_RK, y_RK, np.broadcast_to(np.asarray(kl, dtype=np.float64), reference_R.shape))


def areas(kl_RK: Floats, reward_RK: Floats, reference_R: Floats, kl_max: float) -> Floats:
    """(R,): each resample's mean height of the envelope above the reference's reward from 0 to `kl_max` nats.

    The area divided by `kl_max`, so a mean gain; flat beyond a policy's last point. Exact: the
    envelope is straight between the KLs of its points.
    """
    x_RK, y_RK = _with_reference(kl_RK, reward_RK, reference_R)
    last_R1 = np.full((len(x_RK), 1), kl_max)
    breaks_RK = np.sort(np.concatenate([np.minimum(x_RK, kl_max), last_R1], axis=1))
    height_RK = np.stack([_height(x_RK, y_RK, at_R) for at_R in breaks_RK.T], axis=1)
    total_R = (np.diff(breaks_RK) * (height_RK[:, 1:] + height_RK[:, :-1]) / 2).sum(axis=1)
    mean_R: Floats = total_R / kl_max - reference_R
    return mean_R


def _with_reference(kl_RK: Floats, reward_RK: Floats, reference_R: Floats) -> tuple[Floats, Floats]:
    zero_R1 = np.zeros((len(reference_R), 1))
    x_RK = np.concatenate([zero_R1, np.maximum(kl_RK, 0.0)], axis=1)
    return x_RK, np.concatenate([reference_R[:, None], reward_RK], axis=1)


def _height(x_RK: Floats, y_RK: Floats, at_R: Floats) -> Floats:
    reached_RK = x_RK <= at_R[:, None]
    best_R = np.where(reached_RK, y_RK, -np.inf).max(axis=1)
    for right in range(1, x_RK.shape[1]):
        # Chords from each point on the left to this one, which counts if it is beyond `at_R`.
        run_RK = x_RK[:, right, None] - x_RK
        crosses_RK = reached_RK & ~reached_RK[:, right, None]
        share_RK = np.divide(at_R[:, None] - x_RK, run_RK, out=np.zeros_like(run_RK), where=crosses_RK)
        chord_RK = y_RK + share_RK * (y_RK[:, right, None] - y_RK)
        best_R = np.maximum(best_R, np.where(crosses_RK, chord_RK, -np.inf).max(axis=1))
    return best_R
