"""The `Adapter`: what each format declares in its module's `FORMATS` (kind, recognition, conversion)."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dpo_core.data.layouts.fields import Kind, Ranked, Row, has

Assemble = Callable[[list[tuple[int, Any]], Counter[str]], Iterable[Ranked]]


@dataclass(frozen=True)
class Adapter:
    """One format: the kind of its records, how to recognise its rows, and how to convert one."""

    looks: str
    """Description of its rows."""
    convert: Callable[[Row], Any]
    columns: tuple[str, ...] = ()
    """Its columns: what rows are recognised by, and the closest format in an error is named by."""
    fits: Callable[[Row], bool] | None = None
    """Recognises a row; None: it has all columns."""
    kind: Kind = "pairs"
    assemble: Assemble | None = None
    """For formats with one answer per row: makes ranked lists from the results of `convert` for all rows."""
    note: str = ""
    """A choice made by the format, reported after reading."""
    ranked: bool = False
    """Whether the format uses `data.pairs`."""

    def recognises(self, row: Row) -> bool:
        """Whether a row fits this format; False if the test itself fails on an odd row."""
        try:
            return has(row, *self.columns) if self.fits is None else self.fits(row)
        except Exception:
            return False
