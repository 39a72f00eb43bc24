"""What the run page says of how the data were read, and of the sets of a mixture."""

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from tasks.store.manifest import Manifest


def data_notes(manifests: Mapping[str, Manifest], evaluation: Mapping[str, Any]) -> dict[str, JsonValue]:
    """Remarks of the reader, how prompts became tokens, and rows and accuracy of each set."""
    loaded = manifests["load-data"].extra if "load-data" in manifests else {}
    notes: dict[str, JsonValue] = {}
    remarks, sources = loaded.get("remarks"), loaded.get("sources")
    if isinstance(remarks, list) and remarks:
        notes["How the data were read"] = "; ".join(map(str, remarks))
    judged = [manifest for name, manifest in manifests.items() if name.startswith("validate-")]
    written = dict.fromkeys(str(m.extra["written_as"]) for m in judged if m.extra.get("written_as"))
    if written:
        notes["How prompts were written"] = "; ".join(written)
    if isinstance(sources, dict) and sources:
        notes["Rows by set"] = "; ".join(
            f"{name}: {count['train']} to train on, {count['eval']} held out"
            for name, count in sources.items()
            if isinstance(count, dict)
        )
    for policy, found in evaluation.get("accuracy_by_source", {}).items():
        notes[f"Preference accuracy of {policy} by set"] = "; ".join(
            f"{name}: {one['value']:.1%} [{one['low']:.1%}, {one['high']:.1%}] of {one['n']} pairs"
            for name, one in found.items()
        )
    return notes
