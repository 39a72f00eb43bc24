"""Notes on the run page about the data: how they were read, and results for each set of a mixture."""

from pydantic import JsonValue

from dpo_core.statistics.format import interval
from tasks.reports.about import RunData
from tasks.reports.run_report import EvaluationDetails
from tasks.store.facts import GateFacts, LoadFacts, facts_of


def data_notes(data: RunData, evaluation: EvaluationDetails) -> dict[str, JsonValue]:
    """Notes by title: remarks of the reader, how prompts became tokens, and rows and accuracy of each set."""
    loaded = facts_of(data.loaded, LoadFacts)
    notes: dict[str, JsonValue] = {}
    if loaded.remarks:
        notes["How the data were read"] = "; ".join(loaded.remarks)
    gates = [facts_of(manifest, GateFacts) for manifest in data.gates]
    written = dict.fromkeys(facts.written_as for facts in gates if facts.written_as)
    if written:
        notes["How prompts became tokens"] = "; ".join(written)
    if loaded.sources:
        notes["Rows by set"] = "; ".join(
            f"{name}: {count['train']} to train on, {count['eval']} held out"
            for name, count in loaded.sources.items()
        )
    for policy, accuracies in evaluation.accuracy_by_source.items():
        notes[f"Preference accuracy of {policy} by set"] = "; ".join(
            f"{name}: {interval(accuracy, 'share')} of {accuracy.n} pairs"
            for name, accuracy in accuracies.items()
        )
    return notes
