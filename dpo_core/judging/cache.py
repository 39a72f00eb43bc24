"""Judges' replies by content, so that no question is paid for twice.

    <folder>/<first two digits>/<sha256 of the question>.json

The question is the wording of the template, the judge's address and model, its sampling and the messages.
The address belongs to it: local servers answer to whatever name they are given, and a reply that another
model gave would be wrong without a sign of it; asking again after a move costs time only.

One file a reply, which appears whole by one rename: several processes may read and add at once. Whatever is
not what was written, a torn or an edited file, counts as absent.
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
    """What a judge answered to one question."""

    text: str
    refused: str = ""
    """What the server said where it would not answer this one question; such a reply is not kept."""
    tokens_in: int | None = Field(None, ge=0)
    """Tokens as the server counted them; None where it did not say."""
    tokens_out: int | None = Field(None, ge=0)


class _Entry(Config):
    key: str
    reply_sha256: str
    reply: Reply


def question_key(question: dict[str, Any]) -> str:
    """sha256 of a question's JSON, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """The replies in a folder.

    Args:
        folder: made with the first reply; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply to that question; None where there is none or it is damaged."""
        if self.folder is None:
            return None
        try:
            entry = _Entry.model_validate_json(self._path(self.folder, key).read_bytes())
        except (OSError, ValidationError):
            return None
        sound = entry.key == key and entry.reply_sha256 == _digest(entry.reply)
        return entry.reply if sound else None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; the last of several for one question stays.

        Raises:
            StageFailed: the folder cannot be written.
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
                f"a judge's reply cannot be kept in {self.folder} ({error.strerror or error})",
                "Make room there or let it be written, then run again: earlier replies are kept",
            ) from error

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


def _digest(reply: Reply) -> str:
    return hashlib.sha256(reply.model_dump_json().encode()).hexdigest()
