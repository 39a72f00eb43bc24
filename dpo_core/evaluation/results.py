"""What an evaluation suite leaves: every item with its numbers, and the measures made of them.

Items are kept, not only means: two models are compared item by item, a measure is given again without the
contaminated items, and a reader can look at what was answered.
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
    """One question, pair or prompt of a suite, and what was measured on it."""

    id: str
    """Names the item in the suite, the same for every model."""
    cluster: str
    """The prompt that it belongs to: the unit of resampling."""
    subset: str = ""
    prompt: str = ""
    """What the model was asked, as text; the search for contamination reads it."""
    answer: str = ""
    """What the model wrote, where it wrote something."""
    values: dict[str, float]
    """By the name of the measure; a measure that the item has no part in is left out."""


class MeasureSpec(Config):
    """What a suite measures by the mean over its items."""

    name: str
    """As in `Item.values`."""
    label: str
    better: Better = "higher"
    kind: Kind = "share"
    """share: every value lies in [0, 1]; mean: any number."""
    unit: str = ""


class Measure(MeasureSpec):
    """A number with its interval at 95 %, resampled by prompt."""

    estimate: Estimate
    subset: str = ""
    """Empty: over all items."""
    clean: Estimate | None = None
    """The same without the items that stand in the training data, where that was looked for."""
    paired: bool = True
    """Whether it is the mean of `Item.values`, so that two models can be compared item by item."""


class Outcome(Config):
    """What running a suite gives; `SuiteResult` adds which model and which data."""

    items: list[Item]
    specs: list[MeasureSpec]
    others: list[Measure] = Field(default_factory=list)
    """Measures that are no mean over items (a calibration error, a rank correlation), with `paired` false."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """Counts and remarks: rows left out and why, a temperature without an interval."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """The protocol as it was run: shots, precision, sampling, version of the library that did the work."""


class SuiteResult(Config):
    """One model on one suite."""

    suite: str
    model: str
    """The model as the user named it."""
    weights_sha256: str
    data: dict[str, JsonValue]
    """File name, sha256 and rows of what was asked."""
    settings: dict[str, JsonValue]
    measures: list[Measure]
    items: list[Item]
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    contaminated: dict[str, str] = Field(default_factory=dict)
    """Ids of items found in the training data, and how: `exact` or `13-gram`."""
    seconds: float

    def measure(self, name: str, subset: str = "") -> Measure | None:
        """The measure of that name, None where there is none."""
        return next((m for m in self.measures if m.name == name and m.subset == subset), None)


def measured(
    items: Sequence[Item], specs: Iterable[MeasureSpec], *, seed: int = 0, without: Iterable[str] = ()
) -> list[Measure]:
    """Every measure over all items, then by subset where there is more than one.

    A measure for which there are too few prompts to give an interval is left out.

    Args:
        without: ids of contaminated items; where some are named, `clean` leaves them out.
    """
    listed = list(specs)
    found = [m for spec in listed if (m := _measure(items, spec, "", seed, set(without)))]
    subsets = sorted({item.subset for item in items})
    if len(subsets) > 1:
        for subset in subsets:
            own = [item for item in items if item.subset == subset]
            found += [m for spec in listed if (m := _measure(own, spec, subset, seed, set(without)))]
    return found


def _measure(
    items: Sequence[Item], spec: MeasureSpec, subset: str, seed: int, without: set[str]
) -> Measure | None:
    having = [item for item in items if spec.name in item.values]
    if not _enough(having, spec):
        return None
    clean = [item for item in having if item.id not in without]
    return Measure(
        **spec.model_dump(),
        subset=subset,
        estimate=estimate(having, spec, seed),
        clean=estimate(clean, spec, seed) if len(clean) < len(having) and _enough(clean, spec) else None,
    )


def _enough(items: Sequence[Item], spec: MeasureSpec) -> bool:
    """Whether an interval can be given: a mean over a single prompt has none."""
    return len({item.cluster for item in items}) >= (1 if spec.kind == "share" else 2)


def estimate(items: Sequence[Item], spec: MeasureSpec, seed: int = 0) -> Estimate:
    """Mean of one measure over items: Wilson for a plain share of prompts, else by resampling prompts.

    Raises:
        StageFailed: a value of a share lies outside [0, 1], or the mean of a single prompt is asked for.
    """
    values = np.asarray([item.values[spec.name] for item in items], np.float64)
    clusters = [item.cluster for item in items]
    if spec.kind == "share":
        wrong = [item for item, value in zip(items, values, strict=True) if not 0 <= value <= 1]
        if wrong:
            raise StageFailed(
                f"item {wrong[0].id} has {spec.name} {wrong[0].values[spec.name]}, which is no share",
                "Give shares between 0 and 1",
            )
        return stats.share(values, clusters)
    return stats.bootstrap_mean(values, clusters, seed=seed)
