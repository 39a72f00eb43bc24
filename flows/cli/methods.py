"""`dpo methods`: the ways to train a policy, for people and for scripts."""

import json
from typing import Any

import typer

from dpo_core.methods.method import Method
from dpo_core.methods.registry import get, methods


def list_methods(names: list[str], as_json: bool) -> None:
    """Print all methods, or those named with every setting.

    Raises:
        RecipeError: there is no method of a name.
    """
    listed = [get(name) for name in names] or list(methods().values())
    if as_json:
        typer.echo(json.dumps([facts(method) for method in listed], indent=1, ensure_ascii=False))
        return
    for method in listed:
        typer.echo(_text(method, whole=bool(names)))
    if not names:
        typer.echo("\n`dpo methods NAME` prints the settings of a method.")


def facts(method: Method) -> dict[str, Any]:
    """What a method declares, ready for JSON."""
    return {
        "name": method.name,
        "title": method.title,
        "citation": method.citation,
        "policy": method.policy,
        "needs": method.needs(method.settings()),
        "settings": method.settings.model_json_schema(),
        "curves": [panel.title for panel in method.curves],
    }


def _text(method: Method, whole: bool) -> str:
    where = f"policies: {{NAME: {{method: {method.name}}}}}" if method.policy else "serves the run; no policy"
    lines = [f"{method.name}  ({', '.join(method.needs(method.settings()))})", f"  {method.title}"]
    lines += [f"  {method.citation}", f"  set {where}"]
    if whole:
        fields = method.settings.model_fields.items()
        lines += [f"  {name} = {_default(field)}: {_first_line(field.description)}" for name, field in fields]
    return "\n".join(lines)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return json.dumps(value.model_dump(mode="json") if hasattr(value, "model_dump") else value)


def _first_line(text: str | None) -> str:
    return " ".join((text or "").split())
