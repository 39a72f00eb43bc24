"""The console of the commands, which prints paths and names literally."""

import sys

from rich.console import Console


def terminal(stderr: bool = False) -> Console:
    """A console that interprets neither markup such as `[red]` nor emoji such as `:cat:`."""
    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width, and tables need one.
    return Console(width=None if stream.isatty() else 120, stderr=stderr, markup=False, emoji=False)
