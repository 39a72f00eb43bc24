"""JSON values one after the other out of a text of any length."""

import json
import re
from typing import Any, TextIO

from dpo_core.errors import DataError

_LOOK_AHEAD = 64


class JsonWindow:
    """Text of which only a window is held, decoded value after value."""

    def __init__(self, text: TextIO, path: str, block: int) -> None:
        self.text, self.path, self.decoder = text, path, json.JSONDecoder()
        self.buffer, self.at, self.first, self.block = text.read(block), 0, block, block

    def more(self) -> bool:
        """Read on. Blocks double, so that a long value costs no more than reading the file twice."""
        new = self.text.read(self.block)
        self.buffer, self.at, self.block = self.buffer[self.at :] + new, 0, self.block * 2
        return bool(new)

    def match(self, pattern: str) -> str | None:
        """Step over what the pattern finds here, and return it."""
        # A few signs and blanks: so much of the window is enough, or the file ends.
        while len(self.buffer) - self.at < _LOOK_AHEAD and self.more():
            pass
        found = re.compile(pattern).match(self.buffer, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def at_end(self) -> bool:
        """Whether nothing but white space (and commas between rows) is left."""
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
                if self.more():  # most often the value goes on in the next block
                    continue
                raise DataError(
                    f"{self.path} is not valid JSON at row {number + 1} ({getattr(error, 'msg', error)})",
                    "Correct that row, or what follows the last one; the file may be cut off",
                ) from error
            size, self.at, self.block = end - self.at, end, self.first
            return value, size

    def rest_of_object(self, number: int) -> None:
        """Step over the other fields of the object that held the rows."""
        self.buffer, self.at = '{"data":[]' + self.buffer[self.at :], 0
        self.value(number)


def _skip(text: str, at: int) -> int:
    """The next position that is neither white space nor a comma between values."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t", ","):
        at += 1
    return at
