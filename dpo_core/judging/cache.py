"""Cache of judges' replies by request, so that none is paid for twice.

    <folder>/<first two digits>/<sha256 of the question>.json

The question includes the template's version, the judge's address and model, its sampling settings and the
messages. It includes the address because local servers accept any model name, and a reply of another model
would be wrong without notice. After a server moved, questions are asked again.

Each reply is one file that is renamed into place, so that several processes may read and write at once. A
damaged or edited file counts as missing.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

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


class _Entry(Config):
    key: str
    reply_sha256: str
    reply: Reply


def question_key(question: dict[str, Any]) -> str:
    """SHA-256 of a question's JSON, independent of the order of its fields."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """The replies in a folder.

    Args:
        folder: created with the first reply; None disables the cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply to a question; None if it is missing or damaged."""
        if self.folder is None:
            return None
        try:
            entry = _Entry.model_validate_json(self._path(self.folder, key).read_bytes())
        except (OSError, ValidationError):
            return None
        sound = entry.key == key and entry.reply_sha256 == _digest(entry.reply)
        return entry.reply if sound else None

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply, in place of an earlier one for the same question.

        Raises:
            StageFailed: the folder is not writable.
        """
        if self.folder is None:
            return
        path = self._path(self.folder, key)
        temporary = path.with_name(f"tmp-{os.getpid()}-{uuid.uuid4().hex}")
        entry = _Entry(key=key, reply_sha256=_digest(reply), reply=reply)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(entry.model_dump_json(), encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise StageFailed(
                f"a judge's reply cannot be stored in {self.folder} ({error.strerror or error})",
                "Free space there or make it writable, then run again: earlier replies are kept",
            ) from error

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


def _digest(reply: Reply) -> str:
    return hashlib.sha256(reply.model_dump_json().encode()).hexdigest()
