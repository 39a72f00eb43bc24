"""Reject recipes of the form before `policies`, and show the equivalent sections of today's form."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from dpo_core.errors import RecipeError
from tasks.recipe.policies import CHAMPION, REFERENCE

_SECTIONS = ("dpo", "guide", "ppo", "grpo", "online", "frontier")
_METHODS = {"guide": "dpo", "online": "online_dpo"}
_NAMES = {"dpo": "DPO", "guide": "Guide", "ppo": "PPO", "online": "Online DPO"}
_VARIANTS = {"dr_grpo": "Dr GRPO"}
Fields = dict[str, Any]


def require_new_form(raw: Mapping[str, Any], unusable: str) -> None:
    """Refuse sections of the old form, and show their replacement.

    Raises:
        RecipeError: the recipe has such a section.
    """
    reward = raw.get("reward")
    old = [name for name in _SECTIONS if name in raw]
    if isinstance(reward, Mapping) and "optimise" in reward:
        old.append("reward.optimise")
    if not old:
        return
    try:
        remedy = f"Put in their place:\n\n{_as_yaml(replacement(raw))}"
    except (AttributeError, KeyError, TypeError, ValueError):  # not valid in the old form either
        remedy = "Write policies, each with its method; see a shipped recipe: dpo config show demo"
    if isinstance(raw.get("policies"), Mapping):
        remedy = "Remove them; the recipe already has policies, so set their fields there"
    raise RecipeError(
        f"{unusable}: {', '.join(old)} became part of `policies`, where each policy names its method", remedy
    )


def require_new_override(raw: Mapping[str, Any], override: str) -> None:
    """Refuse `--set dpo.…` and its like on a recipe of today's form.

    Raises:
        RecipeError: the override names a section that became part of `policies`.
    """
    key = override.partition("=")[0].strip()
    section, _, field = key.partition(".")
    policies = raw.get("policies")
    if not isinstance(policies, Mapping) or not (section in _SECTIONS or key == "reward.optimise"):
        return
    write = f"policies.NAME{'.' + field if field else ''}"
    if field == "enabled":
        write = "policies.NAME=null to remove a policy"
    elif key == "reward.optimise":
        write = "policies.NAME.reward=model"
    elif section == "frontier":
        write = f"study.{field or 'seeds'}"
    elif section == "guide":
        write = "policies.Guide, and policies.NAME.reference=Guide"
    raise RecipeError(
        f"--set {key}: there is no field {section if section in _SECTIONS else key} any more; policies are "
        + ", ".join(map(str, policies)),
        f"Write {write}",
    )


class _Plain(yaml.SafeDumper):
    """Repeats shared parts instead of writing aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_yaml(sections: Fields) -> str:
    return yaml.dump(sections, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=100)


def replacement(raw: Mapping[str, Any]) -> Fields:
    """The sections `policies` and `study` that are equivalent to the old sections of a recipe."""
    sections = {name: _mapping(raw.get(name)) for name in ("dpo", "guide", "ppo", "grpo", "online")}
    if raw.get("frontier"):
        return _study(sections, raw["frontier"])
    own = {"reward": "model"} if _mapping(raw.get("reward")).get("optimise") == "model" else {}
    policies: Fields = {}
    if raw.get("guide") is not None:
        policies["Guide"] = _policy("guide", sections["guide"])
    policies["DPO"] = _policy("dpo", sections["dpo"])
    if "Guide" in policies:
        policies["DPO"]["reference"] = "Guide"
    if sections["ppo"].get("enabled", True):  # PPO was on by default
        policies["PPO"] = _policy("ppo", sections["ppo"]) | own
    for name in ("grpo", "online"):
        if raw.get(name) is not None:
            policies[_name(name, sections[name])] = _policy(name, sections[name]) | own
    return {"policies": policies} | ({"candidate": "DPO"} if "Guide" in policies else {})


def _mapping(section: Any) -> Fields:
    return dict(section) if isinstance(section, Mapping) else {}


def _name(section: str, fields: Fields) -> str:
    variant = str(fields.get("variant", "grpo"))
    return _NAMES.get(section) or _VARIANTS.get(variant, variant.upper())


def _method(section: str, fields: Fields) -> str:
    unpaired = section in ("dpo", "guide") and fields.get("objective") in ("kto", "bco")
    return "kto" if unpaired else _METHODS.get(section, section)


def _policy(section: str, fields: Fields) -> Fields:
    """The settings of an old section as a policy."""
    kept = {key: value for key, value in fields.items() if key != "enabled"}
    if section == "online" and "reference" in kept:
        kept["renew_reference"] = kept.pop("reference") == "each_round"
    return {"method": _method(section, fields), **kept}


def _study(sections: Mapping[str, Fields], frontier: Mapping[str, Any]) -> Fields:
    """The replacement of an old frontier: an arm becomes a policy, its settings a grid."""
    policies: Fields = {}
    grid: Fields = {}
    hidden = []
    for arm in frontier.get("arms") or []:
        for settings in _parts(arm):
            name = _free_name(str(arm["name"]), policies)
            fields = sections[arm["method"]]
            for key, value in {**_mapping(arm.get("base")), **_shared(settings)}.items():
                fields = _replaced(fields, key, value)
            policy = _policy(arm["method"], fields)
            if arm.get("reward") == "model":
                policy["reward"] = "model"
            if arm.get("guided"):
                guide = _free_name(f"Guide of {name}", policies)
                policies[guide], grid[guide], policy["reference"] = dict(policy), _points(settings), guide
                hidden.append(guide)
            policies[name], grid[name] = policy, _points(settings)
            if arm.get("drawn") is False:
                hidden.append(name)
    study = {key: value for key, value in frontier.items() if key != "arms"} | {"grid": grid}
    return {"policies": policies, "study": study | ({"hidden": hidden} if hidden else {})}


def _parts(arm: Mapping[str, Any]) -> list[list[Fields]]:
    """The settings of an arm, split so that each part fits one policy: one guide, and one method."""
    settings = [dict(setting) for setting in arm.get("settings") or [{}]]
    if arm.get("guided"):
        return [[setting] for setting in settings]
    by_objective: dict[Any, list[Fields]] = {}
    for setting in settings:
        unpaired = setting.get("objective") in ("kto", "bco")
        by_objective.setdefault(setting.get("objective") if unpaired else None, []).append(setting)
    return list(by_objective.values())


def _shared(settings: list[Fields]) -> Fields:
    """The objective that all these settings share, if they do."""
    objectives = {str(setting.get("objective")) for setting in settings}
    return {"objective": objectives.pop()} if len(objectives) == 1 and "None" not in objectives else {}


def _points(settings: list[Fields]) -> list[dict[str, list[Any]]]:
    """Settings as grids; consecutive settings of the same single field become one grid."""
    grids: list[dict[str, list[Any]]] = []
    for setting in settings:
        if len(setting) == 1 and grids and list(grids[-1]) == list(setting):
            grids[-1][next(iter(setting))] += setting.values()
        else:
            grids.append({key: [value] for key, value in setting.items()})
    return grids


def _free_name(name: str, policies: Mapping[str, Any]) -> str:
    """A valid policy name from `name` that is not taken."""
    name = " ".join(re.sub(r"[^\w +*&,()-]", " ", name).split())[:36]
    taken = {other.lower() for other in (REFERENCE, CHAMPION, *policies)}
    numbered = (name if n == 1 else f"{name} {n}" for n in range(1, len(taken) + 2))
    return next(free for free in numbered if free.lower() not in taken)


def _replaced(fields: Mapping[str, Any], key: str, value: Any) -> Fields:
    """A copy of the fields with one value replaced, by dotted name."""
    first, _, rest = key.partition(".")
    return {**fields, first: _replaced(_mapping(fields.get(first)), rest, value) if rest else value}
