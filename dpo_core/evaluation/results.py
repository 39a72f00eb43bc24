"""The result of an evaluation suite: every item with its values, and the measures computed from them.

Items are stored, not only means: two models are compared item by item, a measure is repeated without the
contaminated items, and readers can look at the answers.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, JsonValue

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.statistics import estimates as stats
from dpo_core.statistics.estimates import Estimate

Better = Literal["higher", "lower", "neither"]
Kind = Literal["share", "mean"]


class Item(Config):
    """One question, pair or prompt of a suite, with its measured values."""

    id: str
    """Identifies the item in the suite, the same for every model."""
    cluster: str
    """Its prompt: the unit of resampling."""
    subset: str = ""
    prompt: str = ""
    """The prompt as text; the contamination check reads it."""
    answer: str = ""
    """The model's answer, if the suite samples one."""
    values: dict[str, float]
    """By name of the measure; without the measures that do not apply to the item."""


class MeasureSpec(Config):
    """A measure of a suite that is the mean over its items."""

    name: str
    """Key in `Item.values`."""
    label: str
    better: Better = "higher"
    kind: Kind = "share"
    """share: every value is in [0, 1]; mean: any number."""
    unit: str = ""
    by_subset: bool = Field(True, exclude_if=lambda by_subset: by_subset)
    """Whether it is also measured on each subset."""


class Measure(MeasureSpec):
    """A measure with its estimate; the interval is at 95 %, resampled by prompt."""

    estimate: Estimate
    subset: str = ""
    """Empty: over all items."""
    clean: Estimate | None = None
    """The same without the items found in the training data, if that was checked."""
    paired: bool = True
    """Whether it is the mean of `Item.values`, so that two models can be compared item by item."""


class Outcome(Config):
    """The outcome of running a suite; `SuiteResult` adds the model and the data."""

    items: list[Item]
    specs: list[MeasureSpec]
    others: list[Measure] = Field(default_factory=list)
    """Measures that are not a mean over items (calibration error, rank correlation), with `paired` false."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """Counts and remarks, such as rows left out and why."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """The protocol: shots, precision, sampling, library version."""


class SuiteResult(Config):
    """The result of one model on one suite."""

    suite: str
    model: str
    """The user's name for the model."""
    weights_sha256: str
    data: dict[str, JsonValue]
    """Name, sha256 and number of rows of the data file."""
    settings: dict[str, JsonValue]
    measures: list[Measure]
    items: list[Item]
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    contaminated: dict[str, str] = Field(default_factory=dict)
    """Ids of items found in the training data, with the kind of match: `exact` or `13-gram`."""
    seconds: float

    def measure(self, name: str, subset: str = "") -> Measure | None:
        """The measure of that name; None if there is none."""
        return next((m for m in self.measures if m.name == name and m.subset == subset), None)


def compute_measures(
    items: Sequence[Item], specs: Iterable[MeasureSpec], *, seed: int = 0, without: Iterable[str] = ()
) -> list[Measure]:
    """Every measure over all items, then by subset if there are several.

    A measure with too few prompts for an interval is left out.

    Args:
        without: ids of contaminated items, which `clean` excludes.
    """
    listed = list(specs)
    measures = [m for spec in listed if (m := _measure(items, spec, "", seed, set(without)))]
    subsets = sorted({item.subset for item in items})
    if len(subsets) > 1:
        for subset in subsets:
            own = [item for item in items if item.subset == subset]
            measures += [
                m
                for spec in listed
                if spec.by_subset and (m := _measure(own, spec, subset, seed, set(without)))
            ]
    return measures


def _measure(
    items: Sequence[Item], spec: MeasureSpec, subset: str, seed: int, without: set[str]
) -> Measure | None:
    relevant = [item for item in items if spec.name in item.values]
    if not _enough(relevant, spec):
        return None
    clean = [item for item in relevant if item.id not in without]
    return Measure(
        **spec.model_dump(),
        subset=subset,
        estimate=estimate(relevant, spec, seed),
        clean=estimate(clean, spec, seed) if len(clean) < len(relevant) and _enough(clean, spec) else None,
    )


def _enough(items: Sequence[Item], spec: MeasureSpec) -> bool:
    """Whether there are enough prompts for an interval: a mean needs two."""
    return len({item.cluster for item in items}) >= (1 if spec.kind == "share" else 2)


def estimate(items: Sequence[Item], spec: MeasureSpec, seed: int = 0) -> Estimate:
    """Mean of one measure over items: Wilson for a plain share of prompts, else by resampling prompts.

    Raises:
        StageFailed: a share is not from 0 to 1, or a mean has a single prompt.
    """
    values = np.asarray([item.values[spec.name] for item in items], np.float64)
    clusters = [item.cluster for item in items]
    if spec.kind == "share":
        for item in items:  # none is NaN: an item does not accept it
            if not 0 <= item.values[spec.name] <= 1:
                raise StageFailed(
                    f"{spec.name} of item {item.id} is {item.values[spec.name]}, but must be from 0 to 1",
                    "Correct the suite",
                )
        return stats.share(values, clusters, name=spec.name)
    return stats.bootstrap_mean(values, clusters, seed=seed, name=spec.name)
