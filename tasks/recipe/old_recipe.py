"""Recipes of the form before `policies`: rejected with the sections that say the same today."""

from collections.abc import Mapping
from typing import Any

import yaml

from dpo_core.errors import RecipeError
from dpo_core.methods.registry import get

_SECTIONS = ("dpo", "guide", "ppo", "grpo", "online", "frontier")
_VARIANTS = {"grpo": "GRPO", "dr_grpo": "DrGRPO", "dapo": "DAPO", "gspo": "GSPO", "rloo": "RLOO"}


def require_new_form(raw: Mapping[str, Any], unusable: str) -> None:
    """Refuse sections that today's recipe does not have, and show their replacement.

    Raises:
        RecipeError: the recipe has such a section.
    """
    reward = raw.get("reward")
    old = [name for name in _SECTIONS if name in raw]
    if isinstance(reward, Mapping) and "optimise" in reward:
        old.append("reward.optimise")
    if not old:
        return
    text = yaml.safe_dump(replacement(raw), sort_keys=False, allow_unicode=True, width=100)
    raise RecipeError(
        f"{unusable}: {', '.join(old)} became part of `policies`, where each policy names its method",
        f"Put in their place:\n\n{text}",
    )


def require_new_override(raw: Mapping[str, Any], override: str) -> None:
    """Refuse `--set dpo.…` and its like on a recipe of today's form.

    Raises:
        RecipeError: the override names a section that became part of `policies`.
    """
    section, _, field = override.partition("=")[0].strip().partition(".")
    policies = raw.get("policies")
    if section not in _SECTIONS or not isinstance(policies, Mapping):
        return
    raise RecipeError(
        f"--set {override.partition('=')[0]}: there is no section {section}; settings of a method belong to "
        "a policy",
        f"Write policies.NAME{'.' + field if field else ''}; there are {', '.join(map(str, policies))}",
    )


def replacement(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sections `policies` and `study` that say what the old sections of a recipe said."""
    sections = {name: dict(raw.get(name) or {}) for name in ("dpo", "ppo", "grpo", "online")}
    optimise = (raw.get("reward") or {}).get("optimise", "source")
    if raw.get("frontier"):
        return _study(sections, raw["frontier"])
    policies: dict[str, Any] = dict(raw["policies"]) if isinstance(raw.get("policies"), Mapping) else {}
    if raw.get("guide") is not None:
        policies["Guide"] = _policy("dpo", dict(raw["guide"]))
    policies["DPO"] = _policy("dpo", sections["dpo"])
    if raw.get("guide") is not None:
        policies["DPO"]["reference"] = "Guide"
    own = {"reward": "model"} if optimise == "model" else {}
    if sections["ppo"].pop("enabled", True) and ("ppo" in raw or not policies.get("PPO")):
        policies["PPO"] = _policy("ppo", sections["ppo"]) | own
    if raw.get("grpo") is not None:
        policies[_VARIANTS.get(sections["grpo"].get("variant", "grpo"), "GRPO")] = (
            _policy("grpo", sections["grpo"]) | own
        )
    if raw.get("online") is not None:
        policies["OnlineDPO"] = _policy("online", sections["online"]) | own
    return {"policies": policies} | ({"candidate": "DPO"} if "Guide" in policies else {})


def _policy(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The settings of an old section as a policy."""
    method = {"online": "online_dpo"}.get(section, section)
    objective = fields.get("objective")
    if section == "dpo" and objective in ("kto", "bco"):
        method = get("kto").name
    if method == "online_dpo" and "reference" in fields:
        fields = {k: v for k, v in fields.items() if k != "reference"} | {
            "renew_reference": fields["reference"] == "each_round"
        }
    return {"method": method} | {k: v for k, v in fields.items() if k != "enabled"}


def _study(sections: Mapping[str, dict[str, Any]], frontier: Mapping[str, Any]) -> dict[str, Any]:
    """The old frontier: an arm is a policy, its settings a grid."""
    policies: dict[str, Any] = {}
    grid: dict[str, list[dict[str, list[Any]]]] = {}
    hidden = []
    for arm in frontier.get("arms") or []:
        method, name = arm["method"], str(arm["name"]).replace(".", "")
        policy = _policy(method, dict(sections[method]))
        for key, value in (arm.get("base") or {}).items():
            _put(policy, key, value)
        if arm.get("reward") == "model":
            policy["reward"] = "model"
        if arm.get("guided"):
            guide = f"Guide of {name}"
            policies[guide], policy["reference"] = dict(policy), guide
            grid[guide] = _points(arm)[:1]
            hidden.append(guide)
        policies[name], grid[name] = policy, _points(arm)
        if arm.get("drawn") is False:
            hidden.append(name)
    study = {key: value for key, value in frontier.items() if key != "arms"} | {"grid": grid}
    return {"policies": policies, "study": study | ({"hidden": hidden} if hidden else {})}


def _points(arm: Mapping[str, Any]) -> list[dict[str, list[Any]]]:
    """An arm's settings as grids: those that change one and the same field together."""
    grids: list[dict[str, list[Any]]] = []
    for setting in arm.get("settings") or [{}]:
        if len(setting) == 1 and grids and list(grids[-1]) == list(setting):
            grids[-1][next(iter(setting))] += setting.values()
        else:
            grids.append({key: [value] for key, value in setting.items()})
    return grids


def _put(policy: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place = policy
    for part in path:
        place[part] = place = dict(place.get(part) or {})
    place[last] = value
