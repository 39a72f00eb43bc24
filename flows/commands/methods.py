"""The body of `dpo methods`: prints the methods of policies with their settings."""

import json
from typing import Any

import typer

from dpo_core.methods.method import Method
from dpo_core.methods.registry import get, methods


def list_methods(names: list[str], as_json: bool) -> None:
    """Print all methods, or the named ones with all settings.

    Raises:
        RecipeError: a method does not exist.
    """
    listed = [get(name) for name in names] or list(methods().values())
    if as_json:
        typer.echo(json.dumps([facts(method) for method in listed], indent=1, ensure_ascii=False))
        return
    for method in listed:
        typer.echo(_text(method, with_settings=bool(names)))
    if not names:
        typer.echo("\n`dpo methods NAME` prints the settings of a method.")


def facts(method: Method) -> dict[str, Any]:
    """The declarations of a method, as JSON."""
    return {
        "name": method.name,
        "title": method.title,
        "citation": method.citation,
        "policy": method.policy,
        "needs": method.needs(method.settings()),
        "settings": method.settings.model_json_schema(),
        "curves": [panel.title for panel in method.curves],
    }


def _text(method: Method, with_settings: bool) -> str:
    use = (
        f"set policies: {{NAME: {{method: {method.name}}}}}"
        if method.policy
        else "not for policies: used by the run itself, or as a job of its own"
    )
    lines = [f"{method.name}  ({', '.join(method.needs(method.settings()))})", f"  {method.title}"]
    lines += [f"  {method.citation}", f"  {use}"]
    if with_settings:
        fields = method.settings.model_fields.items()
        lines += [
            f"  {name} = {default(field)}: {' '.join((field.description or '').split())}"
            for name, field in fields
        ]
    return "\n".join(lines)


def default(field: Any) -> str:
    """The default of a setting, as JSON."""
    value = field.get_default(call_default_factory=True)
    return json.dumps(value.model_dump(mode="json") if hasattr(value, "model_dump") else value)
