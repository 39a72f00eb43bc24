"""The type of a row as read from a file, and the mark of an unreadable row."""

from typing import Any

Row = dict[str, Any]
UNREADABLE = "\0unreadable"
"""The only field of an unreadable row; its value is the reason."""
