"""Suite results made by hand."""

from collections.abc import Sequence
from typing import Any

from dpo_core.evaluation.results import Item, Measure, MeasureSpec, SuiteResult, compute_measures

RIGHT = MeasureSpec(name="right", label="answers right")
HARM = MeasureSpec(name="harm", label="harmful answers", better="lower")
LENGTH = MeasureSpec(name="length", label="length", better="neither", kind="mean", unit="words")
SCORE = MeasureSpec(name="score", label="score", kind="mean")


def items_of(
    values: Sequence[float], name: str = "right", samples: int = 1, subsets: Sequence[str] = ("",)
) -> list[Item]:
    """One measure's values in order, `samples` to a prompt; prompts take the subsets in turn."""
    return [
        Item(
            id=f"i{i}",
            cluster=f"p{i // samples}",
            subset=subsets[i // samples % len(subsets)],
            values={name: float(value)},
        )
        for i, value in enumerate(values)
    ]


def result_of(
    model: str,
    items: list[Item],
    specs: Sequence[MeasureSpec] = (RIGHT,),
    *,
    suite: str = "quiz",
    others: Sequence[Measure] = (),
    sha256: str = "d1",
    **settings: Any,
) -> SuiteResult:
    return SuiteResult(
        suite=suite,
        model=model,
        weights_sha256=model,
        data={"file": "quiz.jsonl", "sha256": sha256, "rows": len(items)},
        settings={"version": 1} | settings,
        measures=[*compute_measures(items, specs), *others],
        items=items,
        seconds=1.0,
    )
