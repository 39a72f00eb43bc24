"""Numbers, shares, durations and intervals as text, in one notation for messages, reports and decisions."""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # numbers are formatted without numpy
    from dpo_core.statistics.estimates import Estimate

Kind = Literal["number", "share", "gap", "points"]
"""`share` is shown in per cent, `gap` with its sign, `points` as a difference of shares in points (pp)."""


def number(value: float, signed: bool = False, scale: float | None = None) -> str:
    """Three significant digits, thousands grouped: 0.0123, 1.23, 12.3, 1,234, 1.2e-05.

    `scale` sets the decimals of numbers shown together: beside 0.118, 0.066 is written 0.066.
    """
    scale = abs(value) if scale is None else scale
    if scale == 0:
        return "0"
    sign = "+" if signed else ""
    if scale < 1e-4 or scale >= 1e9:
        return f"{value:{sign}.1e}"
    decimals = max(0, 2 - math.floor(math.log10(scale)))
    return f"{value:{sign},.{min(decimals, 4)}f}"


def percent(value: float) -> str:
    """0.613 becomes 61.3%."""
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def scaled(value: float, unit: str, base: int = 1000) -> str:
    """A large amount with its prefix: 3.2 GiB (base 1024), 1.4 PFLOP (base 1000)."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    power = min(int(math.log(max(value, 1), base)), len(prefixes) - 1)
    infix = "i" if base == 1024 and power else ""
    prefix = prefixes[power].upper() if infix else prefixes[power]
    return f"{value / base**power:.3g} {prefix}{infix}{unit}"


def p_value(p: float) -> str:
    """0.032, or < 0.001, because resampling is not more precise."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


class Interval(NamedTuple):
    """An estimate as text: `1.24` and `1.02 to 1.46`, together `1.24 [1.02 to 1.46]`."""

    value: str
    bounds: str

    def __str__(self) -> str:
        return f"{self.value} [{self.bounds}]"


def interval(estimate: "Estimate", kind: Kind = "number") -> Interval:
    """An estimate with its interval."""
    return bounded(estimate.value, estimate.low, estimate.high, kind)


def bounded(value: float, low: float, high: float, kind: Kind = "number") -> Interval:
    """A number between two bounds; all three have the same decimals."""
    widest = max(abs(low), abs(high), abs(value))

    def show(x: float) -> str:
        if kind == "share":
            return percent(x)
        return f"{100 * x:+.1f}" if kind == "points" else number(x, kind == "gap", widest)

    unit = " pp" if kind == "points" else ""
    return Interval(f"{show(value)}{unit}", f"{show(low)} to {show(high)}")
