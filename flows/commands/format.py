"""Formats numbers and times for the terminal."""


def count(number: int, noun: str) -> str:
    """`1 run`, `1,000 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(size: float) -> str:
    """Bytes with a suitable unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def readable_time(time: str) -> str:
    """An ISO time with a space before the hour and no seconds; the UTC offset tells summer from winter."""
    return time.replace("T", " ").replace(":00+", "+", 1).replace(":00-", "-", 1)
