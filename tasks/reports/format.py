"""Formats numbers, shares, durations and intervals identically for the page, the terminal and Markdown."""

import math
from typing import Literal, NamedTuple

from dpo_core.statistics.estimates import Estimate


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


class Cell(NamedTuple):
    """One estimate as text: "1.24" and "1.02 to 1.46"."""

    value: str
    interval: str = ""
    n: int | None = None
    more: str = ""
    """A remark below the interval."""
    tone: str = ""
    """The page's colour: good, bad, unclear or plain; the text gives the same information."""

    def __str__(self) -> str:
        return f"{self.value} [{self.interval}]" if self.interval else self.value


def cell(value: Estimate | float | None, kind: Literal["number", "share", "gap"] = "number") -> Cell:
    """The cell of a number: shares in per cent, gaps with their sign, estimates with their interval."""

    def show(v: float, scale: float | None = None) -> str:
        return percent(v) if kind == "share" else number(v, kind == "gap", scale)

    if value is None:
        return Cell("–")
    if isinstance(value, Estimate):
        widest = max(abs(value.low), abs(value.high))
        return Cell(
            show(value.value, widest), f"{show(value.low, widest)} to {show(value.high, widest)}", value.n
        )
    return Cell(show(value))


def share(value: Estimate, more: str = "") -> Cell:
    """A share with its interval: 61.3% [58.0% to 64.5%]."""
    return Cell(percent(value.value), f"{percent(value.low)} to {percent(value.high)}", value.n, more)


def measured(value: Estimate, kind: str, *, difference: bool = False, more: str = "") -> Cell:
    """The cell of a suite's measure or of a difference; shares in per cent, their differences in points
    (pp)."""
    if kind == "share" and not difference:
        return share(value, more)
    widest = max(abs(value.low), abs(value.high), abs(value.value))

    def show(v: float) -> str:
        return f"{100 * v:+.1f}" if kind == "share" else number(v, difference, widest)

    unit = " pp" if kind == "share" else ""
    return Cell(f"{show(value.value)}{unit}", f"{show(value.low)} to {show(value.high)}", value.n, more)
