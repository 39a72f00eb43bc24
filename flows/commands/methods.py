"""The body of `dpo methods`: prints the methods of policies with their settings, also as the docs page."""

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


def markdown() -> str:
    """The docs page `methods.md`: every method with its needs and settings."""
    lines = [
        "# Methods",
        "",
        "The methods of a recipe's policies, as `dpo methods` lists them. Each method is one file in "
        "`dpo_core/methods/`, which declares its settings, the data that it learns from, how it reads the "
        "reference, and its curves on the run page. Its trainer is the file of the same name in "
        "`dpo_core/trainers/`, and its estimate for `dpo plan` is in `dpo_core/estimates/by_method.py`.",
    ]
    for method in methods().values():
        needs = ", ".join(method.needs(method.settings()))
        use = (
            f"`policies: {{NAME: {{method: {method.name}}}}}`"
            if method.policy
            else "Used by the run itself, not by policies."
        )
        lines += [
            "",
            f"## {method.name}",
            "",
            f"{method.title}. {method.citation}.",
            "",
            f"Needs: {needs}. {use}",
        ]
        lines += ["", "| setting | default | |", "| --- | --- | --- |"]
        for name, field in method.settings.model_fields.items():
            text = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{name}` | `{_default(field)}` | {text} |")
    return "\n".join(lines) + "\n"


def _text(method: Method, with_settings: bool) -> str:
    use = (
        f"set policies: {{NAME: {{method: {method.name}}}}}"
        if method.policy
        else "used by the run itself, not by policies"
    )
    lines = [f"{method.name}  ({', '.join(method.needs(method.settings()))})", f"  {method.title}"]
    lines += [f"  {method.citation}", f"  {use}"]
    if with_settings:
        fields = method.settings.model_fields.items()
        lines += [f"  {name} = {_default(field)}: {_first_line(field.description)}" for name, field in fields]
    return "\n".join(lines)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return json.dumps(value.model_dump(mode="json") if hasattr(value, "model_dump") else value)


def _first_line(text: str | None) -> str:
    return " ".join((text or "").split())
