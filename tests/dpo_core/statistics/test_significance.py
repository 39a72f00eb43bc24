"""Significance tests against SciPy, by hand, and against their intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from dpo_core.errors import StageFailed
from dpo_core.statistics.estimates import paired_bootstrap
from dpo_core.statistics.significance import bootstrap_p, holm, mcnemar


def pair(both: int, first: int, second: int, neither: int) -> tuple[list[float], list[float]]:
    """Paired answers by how many both, the first alone, the second alone and neither have right."""
    counts = (both, first, second, neither)
    return np.repeat([1.0, 1, 0, 0], counts).tolist(), np.repeat([1.0, 0, 1, 0], counts).tolist()


@given(st.integers(0, 40), st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
@settings(max_examples=40)
def test_mcnemar_is_the_binomial_test_of_those_on_which_they_differ(
    both: int, first: int, second: int, neither: int
) -> None:
    reference = binomtest(first, first + second).pvalue if first + second else 1
    assert mcnemar(*pair(both, first, second, neither)) == pytest.approx(reference, 1e-9)


def test_mcnemar_by_hand() -> None:
    # One alone right in 0 of 5: 2·(1/2)^5. Items on which both agree say nothing.
    assert mcnemar(*pair(0, 5, 0, 0)) == mcnemar(*pair(90, 0, 5, 90)) == pytest.approx(1 / 16)
    assert mcnemar(*pair(3, 0, 0, 4)) == mcnemar(*pair(0, 2, 2, 0)) == 1.0
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="1 and 2 items"):
        mcnemar([1.0], [0.0, 1.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.01, 0.01, 0.0]) == pytest.approx([0.2, 0.03, 0.03, 0.0])
    assert holm([0.7, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="outside"):
        holm([0.5, 1.1])


@pytest.mark.parametrize("n", [12, 80])
def test_the_bootstrap_test_says_what_the_interval_says(n: int) -> None:
    """Whatever the confidence: p is the level at which the interval of the same draws would end at zero."""
    rng = np.random.default_rng(n)
    clusters = np.repeat(np.arange(n), 3).tolist()
    for shift in (-0.4, -0.1, 0.05, 0.3):
        a = np.repeat(rng.normal(shift, 1, n), 3) + rng.normal(size=3 * n)
        b = np.zeros(3 * n)
        p = bootstrap_p(a, b, clusters, seed=4)
        assert 0 < p < 1
        inside = paired_bootstrap(a, b, clusters, seed=4, confidence=1 - 0.9 * p)
        outside = paired_bootstrap(a, b, clusters, seed=4, confidence=1 - 1.1 * p)
        assert inside.low < 0 < inside.high
        assert outside.low > 0 or outside.high < 0


def test_the_bootstrap_test_is_nearly_students_on_normal_values() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(0.3, 1, 60)
    reference = stats.ttest_1samp(values, 0).pvalue
    assert bootstrap_p(values, np.zeros(60)) == pytest.approx(reference, rel=0.25)


def test_the_bootstrap_test_at_its_ends() -> None:
    same = np.random.default_rng(2).normal(size=30)
    assert bootstrap_p(same, same) == 1.0
    # Ten against ten the other way: the middle of a symmetric distribution.
    assert bootstrap_p([0.1] * 10 + [-0.1] * 10, [0.0] * 20) == pytest.approx(1.0, abs=0.02)
    assert 2 / 10_001 <= bootstrap_p(same + 100, same) < 0.002, "never 0: only so much was drawn"
    assert bootstrap_p([1.0, 1.1], [0.0, 0.0]) > 0.1, "two prompts prove nothing"
    assert bootstrap_p(same, same + 0.2, seed=1) == bootstrap_p(same, same + 0.2, seed=1)
    assert bootstrap_p(same, same + 0.2) == pytest.approx(bootstrap_p(same + 0.2, same), rel=1e-9)
    with pytest.raises(StageFailed, match="at least 2 prompts"):
        bootstrap_p([1.0, 2.0], [0.0, 0.0], ["a", "a"])
