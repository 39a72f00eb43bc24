"""Strict YAML: reads plain values, refuses duplicate keys and alias bombs; writes commented configurations.

PyYAML's safe loader creates only plain values, but silently takes the last of two equal keys, and lets
aliases of aliases expand to more values than fit in memory. `commented` and `form` write a configuration with
the meaning of each field above it, as a starting point for the user's own file.
"""

import json
import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_DEPTH = 100
MAX_VALUES = 100_000
"""Maximum number of values in a text; an alias counts with all values that it expands to."""


def read_yaml(text: str) -> Any:
    """The values of a text.

    Raises:
        yaml.YAMLError: the text is not YAML, contains a Python object or a duplicate key, expands to more
            than `MAX_VALUES` values, or has a value that does not match its tag. The error has the line, if
            any.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def quoted(text: str) -> str:
    """A text as a YAML string for `--set a.b=…`. JSON's surrogate pairs are not valid YAML."""
    return "".join(_escaped(character) for character in json.dumps(text, ensure_ascii=False))


def _escaped(character: str) -> str:
    number = ord(character)
    if number < 0x7F:
        return character
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, and deeply nested values, on which PyYAML would take minutes and then fail."""

    depth = 0

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            # 2026-02-30, !!int abc, !!bool maybe, a number of more digits than Python reads.
            kind = node.tag.rpartition(":")[2]
            shown = str(node.value)[:40] if isinstance(node, ScalarNode) else "this"
            problem = f"{shown} cannot be read as {kind} (put it in quotes to make it a text)"
            raise ConstructorError(None, None, problem, node.start_mark) from error

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        mapping: MappingNode = super().compose_mapping_node(anchor)
        _refuse_duplicates(mapping)
        return mapping

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConstructorError(None, None, "values are nested too deeply", self.peek_event().start_mark)
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _count(node: Node, known: dict[int, int | None]) -> int:
    """The number of values that a node expands to."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ConstructorError(None, None, "an alias refers to a value that contains it", node.start_mark)
        return size
    known[id(node)] = None
    size = 1 + sum(_count(child, known) for child in _children(node))
    if size > MAX_VALUES:
        raise ConstructorError(
            None, None, f"aliases expand to more than {MAX_VALUES:,} values", node.start_mark
        )
    known[id(node)] = size
    return size


def _refuse_duplicates(mapping: MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        # Merged keys (<<) are meant to be overwritten.
        if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        identity = (key.tag, key.value)
        if identity in lines:
            problem = f"the key {key.value} is on line {lines[identity]} and again on line {line}"
            raise ConstructorError(None, None, problem, key.start_mark)
        lines[identity] = line


_WIDTH = 100
_SCALAR_END = "...\n"  # YAML's end mark after a single scalar


def commented(config: BaseModel) -> str:
    """The fields of a configuration as YAML, each below a comment with its description."""
    return _fields(config, "")


def form(kind: type[BaseModel]) -> str:
    """All fields of a configuration class with their defaults; fields without a default are marked
    required."""
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
            lines.append(_nested(name, value, indent))
        elif isinstance(value, dict) and any(isinstance(part, BaseModel) for part in value.values()):
            lines.append(f"{indent}{name}:")
            for key, part in value.items():
                lines += [
                    *_comment(type(part).__doc__, indent + "  "),
                    _nested(_key(key), part, indent + "  "),
                ]
        else:
            # A field that was added later is left out of the dump at its default, for the keys of stages.
            lines.append(_line(name, plain.get(name, value), indent))
    return "\n".join(lines) + "\n"


def _nested(name: str, config: BaseModel, indent: str) -> str:
    """The fields of a nested configuration, indented below its name."""
    return f"{indent}{name}:\n{_fields(config, indent + '  ').rstrip()}"


def _key(name: str) -> str:
    """A user's name as a YAML key, quoted if necessary."""
    return name if _plain(name) else quoted(name)


def _plain(name: str) -> bool:
    try:
        return bool(yaml.safe_load(f"{name}: 0") == {name: 0})
    except yaml.YAMLError:
        return False


def _comment(description: str | None, indent: str) -> list[str]:
    text = " ".join((description or "").split())
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH - len(indent))]


def _line(name: str, value: Any, indent: str) -> str:
    """One field on one line, including lists and mappings."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return f"{indent}{name}: {text.removesuffix(_SCALAR_END).strip()}"
