"""The docs page scaling.md has the numbers of the formulas, and the formulas agree with the paper."""

from pathlib import Path

import pytest

from dpo_core.training import scaling


@pytest.mark.parametrize("name", scaling.MODELS)
def test_the_page_has_the_tables(name):
    page = (Path(__file__).parents[3] / "flows" / "docs" / "scaling.md").read_text()
    assert scaling.table(name) in page


def test_volumes_in_sizes_of_the_model():
    size = scaling.BYTES * 1e9
    many = 10**6
    assert scaling.sent_bytes(1e9, many, 0) == pytest.approx(2 * size, rel=1e-5)
    assert scaling.sent_bytes(1e9, many, 1, micro_batches=4) == pytest.approx(2 * size, rel=1e-5)
    assert scaling.sent_bytes(1e9, many, 2, micro_batches=4) == pytest.approx(5 * size, rel=1e-5)
    assert scaling.sent_bytes(1e9, many, 3, micro_batches=4) == pytest.approx(12 * size, rel=1e-5)
    assert scaling.sent_bytes(1e9, 1, 3) == 0
    assert scaling.state_bytes(1e9, 8, 0) == 16e9
    assert scaling.state_bytes(1e9, 8, 3) == 2e9


def test_the_recommendation_is_the_lowest_stage_that_fits():
    assert scaling.recommendation(1e9, 1) == "`zero_stage: 0`"
    assert scaling.recommendation(7e9, 8) == "`zero_stage: 2`"
    assert scaling.recommendation(70e9, 1) == "`zero_stage: 3, offload: parameters`"
