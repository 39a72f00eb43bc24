"""A row as a file holds it, before any layout is recognised in it."""

from typing import Any

Row = dict[str, Any]
UNREADABLE = "\0unreadable"
"""The only field of a row that is in the file and cannot be read; its value says why."""
