"""Converts reports of earlier versions, in which the candidate always had the name DPO."""

from collections.abc import Iterator, Mapping
from typing import Any

_REFERENCE, _CANDIDATE, _GUIDE = "SFT", "DPO", "Guide"
_TRAINED_BY = {
    _GUIDE: ("train-guide", "dpo"),
    _CANDIDATE: ("train-dpo", "dpo"),
    "PPO": ("train-ppo", "ppo"),
    **dict.fromkeys(("GRPO", "Dr. GRPO", "DAPO", "GSPO", "RLOO"), ("train-grpo", "grpo")),
    "Online DPO": ("train-online", "online_dpo"),
}
"""Stage and method by policy."""
_PAIRED = (_GUIDE, _CANDIDATE)
_REFERENCES = ("prepare-sft", "import-model")


def is_old(facts: Mapping[str, Any]) -> bool:
    """Whether a report was written by an earlier version: it has neither candidate nor policies."""
    return "candidate" not in facts and "policies" not in facts


def upgraded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an old report under the names of `RunReport`."""
    new = dict(facts)
    objective = new.pop("objective", "dpo")
    stages = [_name(row) for row in facts.get("stages") or ()]
    by_short_name = {stage.removeprefix("train-").removeprefix("prepare-"): stage for stage in stages}
    return new | {
        "candidate": _CANDIDATE,
        "policies": dict(_policies(facts, stages, objective)),
        "reference_stage": next((stage for stage in _REFERENCES if stage in stages), ""),
        "curves": {by_short_name.get(key, key): rows for key, rows in (facts.get("curves") or {}).items()},
    }


def _policies(
    facts: Mapping[str, Any], stages: list[str], objective: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    evaluation = _fields(facts.get("evaluation"))
    measured = [_name(row) for row in evaluation.get("policies") or ()]
    learned = "model" if facts.get("reward_model") else "source"
    for name, (stage, method) in _TRAINED_BY.items():
        if stage not in stages or (name not in measured and name not in _PAIRED):
            continue
        paired = name in _PAIRED
        guided = name == _CANDIDATE and _TRAINED_BY[_GUIDE][0] in stages
        yield (
            name,
            {
                "method": method,
                "words": objective if paired else method,
                "objective": objective if paired else "",
                "reward": None if paired else learned,
                "start": _REFERENCE,
                "reference": _GUIDE if guided else _REFERENCE,
                "stage": stage,
            },
        )


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _name(row: Any) -> str:
    return str(row["name"]) if isinstance(row, Mapping) else str(getattr(row, "name", ""))
