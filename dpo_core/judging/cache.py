"""Cache of judges' replies by request, so that none is paid for twice.

    <folder>/<first two digits>/<sha256 of the question>.json

The question includes the template's version, the judge's address and model, its sampling settings and the
messages. It includes the address because local servers accept any model name, and a reply of another model
would be wrong without notice. After a server moved, questions are asked again. Several processes may read and
write at once; a damaged or edited file counts as missing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.config import Config
from dpo_core.errors import StageFailed


class Reply(Config):
    """A judge's reply to one question."""

    text: str
    refused: str = ""
    """The server's error if it rejected this question; such a reply is not cached."""
    tokens_in: int | None = Field(None, ge=0)
    """Token count reported by the server; None if it reported none."""
    tokens_out: int | None = Field(None, ge=0)


def question_key(question: dict[str, Any]) -> str:
    """SHA-256 of a question's JSON, independent of the order of its fields."""
    # Not `digest_json`, whose spacing differs: replies that were paid for would no longer be found.
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """The replies in a folder.

    Args:
        folder: created with the first reply; None disables the cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply to a question; None if it is missing, damaged or of another version."""
        if self.folder is None:
            return None
        entry = read_checked(_path(self.folder, key), "the question is asked again")
        try:
            return Reply.model_validate(entry["reply"]) if entry and entry["key"] == key else None
        except (ValidationError, KeyError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply, in place of an earlier one for the same question.

        Raises:
            StageFailed: the folder is not writable.
        """
        if self.folder is None:
            return
        path = _path(self.folder, key)
        try:
            write_checked(path, {"key": key, "reply": reply.model_dump()})
        except OSError as error:
            raise StageFailed(
                f"a judge's reply cannot be stored in {self.folder} ({error.strerror or error})",
                "Free space there or make it writable, then run again: earlier replies are kept",
            ) from error


def _path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.json"
