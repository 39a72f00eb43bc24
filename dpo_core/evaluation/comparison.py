"""Two models on the same suites: paired differences with intervals, tests, and a correction over all of them.

The rows are what `dpo compare`, the run page and the decision to promote read.
"""

from typing import Literal

from dpo_core.config import Config
from dpo_core.evaluation.results import Better
from dpo_core.stats import Estimate

Test = Literal["McNemar", "paired bootstrap"]
Finding = Literal["better", "worse", "undecided"]


class Row(Config):
    """One measure of a candidate and of what it is compared with, on the items that both answered."""

    suite: str
    measure: str
    label: str
    subset: str = ""
    better: Better
    candidate: Estimate
    baseline: Estimate
    difference: Estimate
    """Candidate minus baseline, paired by item, resampled by prompt."""
    items: int
    test: Test
    p: float
    """Of no difference, two-sided."""
    p_holm: float | None = None
    """Corrected for all rows that were tested together (Holm 1979); None for rows that only inform."""
    finding: Finding
    """Worse or better at 5 % after the correction; of a row that only informs, `undecided`."""


class Comparison(Config):
    """A candidate against one baseline."""

    candidate: str
    baseline: str
    rows: list[Row]
    left_out: list[str]
    """Suites and measures that could not be compared, each with the reason."""
