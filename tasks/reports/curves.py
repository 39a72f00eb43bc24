"""Compares the beginning and end of training curves by means over many steps, because batches are noisy."""

from collections.abc import Iterable
from statistics import fmean, variance

# Student's t at 95 % for the difference of two means, by the number of values of each.
_STUDENT = {2: 4.3, 3: 2.8, 4: 2.4, 5: 2.3, 6: 2.2, 7: 2.2, 8: 2.1, 9: 2.1}


def series(rows: Iterable[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric; rows without it are skipped."""
    points = [(row["step"], row[metric]) for row in rows if metric in row and "step" in row]
    return [x for x, _ in points], [y for _, y in points]


def start_and_end(values: list[float]) -> tuple[float, float] | None:
    """Means of the first and the last tenth; None for fewer than two values."""
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def quarters(values: list[float]) -> tuple[list[float], list[float]] | None:
    """The first and the last quarter, at least two values each; None for fewer than four."""
    if len(values) < 4:
        return None
    size = max(2, len(values) // 4)
    return values[:size], values[-size:]


def clear_change(values: list[float]) -> tuple[float, float, int]:
    """Means of the first and the last quarter; 1 for a clear rise, -1 for a clear fall, else 0.

    A change is clear if it exceeds two standard errors of the difference, or Student's t for few values.
    """
    parts = quarters(values)
    if parts is None:
        return 0.0, 0.0, 0
    first, last = parts
    error = (variance(first) / len(first) + variance(last) / len(last)) ** 0.5
    start, end = fmean(first), fmean(last)
    needed = _STUDENT.get(len(first), 2.0) * error
    return start, end, (end - start > needed) - (start - end > needed)
