"""What a module of layouts declares of each format that it reads, in its `FORMATS`."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dpo_core.data.layouts.fields import Kind, Ranked, Row

Assemble = Callable[[list[tuple[int, Any]], Counter[str]], Iterable[Ranked]]


@dataclass(frozen=True)
class Adapter:
    """One format: what its rows become, how they look, and the function that converts one."""

    kind: Kind
    looks: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Any]
    columns: tuple[str, ...] = ()
    """The columns that make the format, for saying what rows come near to."""
    assemble: Assemble | None = None
    """Where an answer stands in a row of its own: makes ranked lists of what `convert` gave for all rows."""
    note: str = ""
    """A choice that the format made, said after reading."""
    ranked: bool = False
    """Whether `data.pairs` is read."""
