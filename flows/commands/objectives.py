"""The body of `dpo objectives`: prints the objectives and their variants with definitions and parameters."""

import difflib
import json
from typing import Any

import typer

from dpo_core.errors import RecipeError
from dpo_core.objectives import VARIANTS, get, names

_LEGEND = """\
w = chosen, l = rejected, n = tokens of the completion; log π is summed over the completion, EOS included;
h = log π - log π_ref; D = h_w - h_l; u = beta·D. The loss is the mean over the global batch (B,).
Parameters of an objective are set under policies.NAME.parameters.
"""


def list_objectives(wanted: list[str], as_json: bool) -> None:
    """Print all objectives and variants, or the named ones with their complete definitions.

    Raises:
        RecipeError: an objective or variant does not exist.
    """
    known = {f["name"]: f for f in [get(name).facts() for name in names()] + [v.facts() for v in VARIANTS]}
    wanted = [name.lower() for name in wanted]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise RecipeError(f"there is no objective '{name}'{hint}", f"Choose one of: {', '.join(known)}")
    listed = [known[name] for name in wanted or known]
    if as_json:
        typer.echo(json.dumps(listed, indent=1, ensure_ascii=False))
        return
    typer.echo(_LEGEND)
    for facts in listed:
        typer.echo(_text(facts, complete=bool(wanted)))
    if not wanted:
        typer.echo("\n`dpo objectives NAME` prints the complete definition.")


def _text(facts: dict[str, Any], complete: bool) -> str:
    definition = facts["definition"].splitlines()
    first = facts.get("value_at_reference")
    lines = [
        *([*definition, ""] if complete else definition[:1]),
        facts["citation"],
        f"set {facts['setting']}",
        *(f"{name} = {_number(p)}" for name, p in facts["parameters"].items()),
        *([f"loss {first:.6g} while policy and reference are equal"] if first is not None else []),
        *([f"note: {facts['caveat']}"] if facts.get("caveat") else []),
    ]
    head = f"{facts['name']}  ({', '.join(facts['needs'])})"
    return "\n".join([head, *(f"  {line}".rstrip() for line in lines)])


def _number(parameter: dict[str, Any]) -> str:
    default, low, high, meaning = (parameter[key] for key in ("default", "low", "high", "meaning"))
    return f"{default:g} in [{low:g}, {'inf' if high is None else f'{high:g}'}]: {meaning}"
