"""A configuration as YAML with what each field means above it, to start a file of one's own from."""

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel

_WIDTH = 100
_END = "...\n"  # what YAML ends a lone scalar with


def commented(config: BaseModel) -> str:
    """The fields of a configuration, nested ones indented, each below its description."""
    return _fields(config, "")


def form(kind: type[BaseModel]) -> str:
    """All fields of a kind of configuration with their defaults; those without one have to be filled in."""
    lines = []
    for name, field in kind.model_fields.items():
        lines += _comment(field.description, "")
        if field.is_required():
            lines.append(f"{name}:  # required")
        else:
            lines.append(_line(name, field.get_default(call_default_factory=True), ""))
    return "\n".join(lines) + "\n"


def _fields(config: BaseModel, indent: str) -> str:
    lines = []
    plain = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        lines += _comment(field.description, indent)
        if isinstance(value, BaseModel) and type(value).model_fields:
            lines.append(f"{indent}{name}:\n{_fields(value, indent + '  ').rstrip()}")
        else:
            lines.append(_line(name, plain[name], indent))
    return "\n".join(lines) + "\n"


def _comment(description: str | None, indent: str) -> list[str]:
    told = " ".join((description or "").split())
    return [f"{indent}# {line}" for line in textwrap.wrap(told, _WIDTH - len(indent))]


def _line(name: str, value: Any, indent: str) -> str:
    """One field; lists and mappings stay on its line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return f"{indent}{name}: {text.removesuffix(_END).strip()}"
