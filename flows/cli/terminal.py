"""The terminal of a command: what is printed is shown as it is."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def terminal(stderr: bool = False) -> "Console":
    """A console to which paths and names are text: `[red]` is no markup and `:cat:` no emoji."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width of its own; tables need room.
    return Console(width=None if stream.isatty() else 120, stderr=stderr, markup=False, emoji=False)
