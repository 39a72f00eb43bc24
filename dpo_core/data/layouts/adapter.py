"""The `Adapter`: what each format declares in its module's `FORMATS` (kind, recognition, conversion)."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dpo_core.data.layouts.fields import Kind, Ranked, Row

Assemble = Callable[[list[tuple[int, Any]], Counter[str]], Iterable[Ranked]]


@dataclass(frozen=True)
class Adapter:
    """One format: the kind of its records, how to recognise its rows, and how to convert one."""

    kind: Kind
    looks: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Any]
    columns: tuple[str, ...] = ()
    """The format's columns, for naming the closest format in an error."""
    assemble: Assemble | None = None
    """For formats with one answer per row: makes ranked lists from the results of `convert` for all rows."""
    note: str = ""
    """A choice made by the format, reported after reading."""
    ranked: bool = False
    """Whether the format uses `data.pairs`."""
