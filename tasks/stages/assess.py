"""Assess a run's evaluation: tables of suites, comparisons and win rates, and the decision to promote."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_core.evaluation.compare import Comparison, compare
from dpo_core.evaluation.decision import Decision, Evidence, decide, refuse_same_weights
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.suites.registry import find
from dpo_core.judging.results import WinRate
from tasks.promotion.model_source import Champion
from tasks.recipe.policies import CHAMPION, REFERENCE
from tasks.recipe.recipe import Recipe
from tasks.reports.run_report import EvaluationDetails, GateRow, SuiteRow
from tasks.stages.judging import JUDGE, load_win_rates
from tasks.stages.registry import label_of, stage_of
from tasks.stages.suites import SUITES, load_suites
from tasks.store.manifest import Manifest


class Assessment(NamedTuple):
    """Tables of a run's report."""

    suites: list[SuiteRow]
    comparisons: list[Comparison]
    win_rates: list[WinRate]


def assess(recipe: Recipe, manifests: Mapping[str, Manifest], evaluation: EvaluationDetails) -> Assessment:
    """The results of suites and judges as tables.

    Args:
        manifests: by stage.
        evaluation: the result of the evaluation stage.
    """
    results = {
        label_of(name).strip(): load_suites(manifest)
        for name, manifest in manifests.items()
        if stage_of(name) is SUITES
    }
    comparisons = [
        compare(results[recipe.candidate_name], results[other], seed=recipe.seed)
        for other in (REFERENCE, CHAMPION)
        if results and other in results
    ]
    return Assessment(
        suites=[suite_row(result) for listed in results.values() for result in listed],
        comparisons=comparisons,
        win_rates=[
            *evaluation.win_rates,
            *(load_win_rates(manifests[JUDGE.name]) if JUDGE.name in manifests else []),
        ],
    )


def decide_promotion(
    recipe: Recipe,
    evaluation: EvaluationDetails,
    comparisons: Sequence[Comparison],
    gate: Sequence[GateRow],
    alarms: Mapping[str, str],
    champion: Champion | None,
    candidate: str,
) -> Decision:
    """Compare the candidate with the champion, or with the reference if there is no champion.

    Args:
        alarms: the alarms about the candidate, its reference or its data, by name.
        champion: the registered model; it is not evaluated if it is the candidate itself.
        candidate: the candidate's name in sentences.
    """
    rival = CHAMPION if evaluation.policy(CHAMPION) else REFERENCE
    if champion and rival != CHAMPION:
        return refuse_same_weights(candidate, champion.title)
    against = [c for c in comparisons if c.baseline == rival]
    name = recipe.candidate_name
    row = next(row for row in evaluation.policies if row.name == name)
    gain = row.gain if rival == REFERENCE else evaluation.gain_over_champion[name]
    assert gain is not None  # every policy but the reference has one
    evidence = Evidence(
        gain=gain,
        kl=row.kl,
        comparison=against[0] if against else None,
        gate_passed=not any(row.refused for row in gate),
        alarms=alarms,
    )
    title = champion.title if champion else "the reference"
    rules = recipe.promotion
    if recipe.diffusion:  # no log-probs, no KL
        rules = rules.model_copy(update={"max_kl": None})
    return decide(rules, evidence, candidate=candidate, champion=title)


def suite_row(result: SuiteResult) -> SuiteRow:
    """A result as a row of tables."""
    return SuiteRow(
        suite=result.suite,
        title=find(result.suite).title,
        policy=result.model,
        items=len(result.items),
        contaminated=len(result.contaminated),
        measures=result.measures,
    )
