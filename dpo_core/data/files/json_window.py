"""Streaming JSON decoder: reads one value after another from a text of any length."""

import json
import re
from typing import Any, TextIO

from dpo_core.errors import DataError

_LOOK_AHEAD = 64


class JsonWindow:
    """Decodes a text value by value and holds only a window of it in memory."""

    def __init__(self, text: TextIO, path: str, block: int) -> None:
        self.text, self.path, self.decoder = text, path, json.JSONDecoder()
        self.buffer, self.at, self.first, self.block = text.read(block), 0, block, block

    def more(self) -> bool:
        """Read another block. Blocks double, so that a long value costs at most reading the file twice."""
        new = self.text.read(self.block)
        self.buffer, self.at, self.block = self.buffer[self.at :] + new, 0, self.block * 2
        return bool(new)

    def match(self, pattern: str) -> str | None:
        """Skip and return what matches the pattern at the current position; None without a match."""
        # The patterns match a few characters, so a short look-ahead suffices unless the file ends.
        while len(self.buffer) - self.at < _LOOK_AHEAD and self.more():
            pass
        match = re.compile(pattern).match(self.buffer, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match.group()

    def at_end(self) -> bool:
        """Whether only white space and commas are left."""
        while True:
            self.at = _skip(self.buffer, self.at)
            if self.at < len(self.buffer):
                return False
            if not self.more():
                return True

    def value(self, number: int) -> tuple[Any, int]:
        """The next JSON value, and its length."""
        while True:
            self.at = _skip(self.buffer, self.at)
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except (ValueError, RecursionError) as error:
                if self.more():  # usually the value continues in the next block
                    continue
                raise DataError(
                    f"{self.path} is not valid JSON at row {number + 1} ({getattr(error, 'msg', error)})",
                    "Correct that row. If it is the last one, the file may be cut off: copy it again",
                ) from error
            size, self.at, self.block = end - self.at, end, self.first
            return value, size

    def rest_of_object(self, number: int) -> None:
        """Skip the other fields of the object that contained the rows."""
        self.buffer, self.at = '{"data":[]' + self.buffer[self.at :], 0
        self.value(number)


def _skip(text: str, at: int) -> int:
    """The next position that is neither white space nor a comma between values."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t", ","):
        at += 1
    return at
