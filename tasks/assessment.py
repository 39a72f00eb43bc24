"""What a run's evaluation comes to: tables of suites, comparisons, win rates, and the decision to promote."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_core.evaluation.comparison import Comparison, compare
from dpo_core.evaluation.decision import Decision, decide
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.suites import find
from dpo_core.judging.results import WinRate
from dpo_core.stats import Estimate
from tasks.champion import NAME, Champion
from tasks.judging import load_win_rates
from tasks.manifest import Manifest
from tasks.recipe import Recipe
from tasks.report import GateRow, SuiteRow
from tasks.suites import load_suites

CANDIDATE, REFERENCE = "DPO", "SFT"


class Assessment(NamedTuple):
    """Parts of a run's report."""

    suites: list[SuiteRow]
    comparisons: list[Comparison]
    win_rates: list[WinRate]
    decision: Decision


def assess(
    recipe: Recipe,
    manifests: Mapping[str, Manifest],
    evaluation: dict[str, Any],
    gate: list[GateRow],
    champion: Champion | None,
    candidate: str,
) -> Assessment:
    """Hold the trained model against the champion, or against the reference while there is none.

    Args:
        manifests: by stage.
        evaluation: what the evaluation stage wrote.
        champion: the registered model; the run's own is no rival of itself.
        candidate: as sentences name the trained model.
    """
    results = {
        name.removeprefix("suites "): load_suites(manifest)
        for name, manifest in manifests.items()
        if name.startswith("suites ")
    }
    rival = NAME if any(row["name"] == NAME for row in evaluation["policies"]) else REFERENCE
    comparisons = [
        compare(results[CANDIDATE], results[other], seed=recipe.seed)
        for other in (REFERENCE, NAME)
        if results and other in results
    ]
    against = [c for c in comparisons if c.baseline == rival]
    row = next(row for row in evaluation["policies"] if row["name"] == CANDIDATE)
    gain = row["gain"] if rival == REFERENCE else evaluation["gain_over_champion"][CANDIDATE]
    title = "the reference"
    if champion:
        title = champion.title if rival == NAME else f"the reference; it is {champion.title} itself"
    decision = decide(
        recipe.promotion,
        candidate=candidate,
        champion=title,
        gain=Estimate.model_validate(gain),
        kl=Estimate.model_validate(row["kl"]) if row.get("kl") else None,
        comparison=against[0] if against else None,
        gate_green=not any(row.refused for row in gate),
    )
    return Assessment(
        suites=[suite_row(result) for listed in results.values() for result in listed],
        comparisons=comparisons,
        win_rates=[
            *(WinRate.model_validate(rate) for rate in evaluation["win_rates"]),
            *(load_win_rates(manifests["judge"]) if "judge" in manifests else []),
        ],
        decision=decision,
    )


def suite_row(result: SuiteResult) -> SuiteRow:
    """A result as tables show it."""
    return SuiteRow(
        suite=result.suite,
        title=find(result.suite).title,
        policy=result.model,
        items=len(result.items),
        contaminated=len(result.contaminated),
        measures=result.measures,
    )
