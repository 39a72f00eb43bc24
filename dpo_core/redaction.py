"""Redaction: removes secrets from texts and log records, and finds secrets in settings.

Recipes are written to MLflow, Prefect, manifests and the run page, and errors to logs. Secrets therefore
belong only in environment variables, from which the code that needs them reads them.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "…"
SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|AUTH_STRING|NOTIFY_URL",
    re.IGNORECASE,
)
"""Names of environment variables that contain a secret."""
_NAMES_A_FILE = re.compile(r"(FILE|PATH|DIR|APPLICATION_CREDENTIALS)$", re.IGNORECASE)
# Removing shorter values (true, 4096) would damage ordinary text.
_MIN_LENGTH = 8
_USER_PART = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"\\]+@")
_QUERY = re.compile(
    r"([?&](?:[\w.-]*(?:token|secret|password|passwd|signature|credential|api_?key|access_?key)|key|sig)=)"
    r"[^&\s#'\"\\]+",
    re.IGNORECASE,
)
# Tokens with the prefixes by which their issuers mark them.
_MARKED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    r"|AKIA[0-9A-Z]{16}|xox[abpr]-[A-Za-z0-9-]{10,}|glpat-[\w-]{20,})"
)


def redact(text: str) -> str:
    """The text without secrets: user parts and tokens of addresses, known token formats, secret variables."""
    for value in _values(os.environ):
        text = text.replace(value, HIDDEN)
    text = _USER_PART.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    return _MARKED.sub(HIDDEN, text)


def _values(environment: Mapping[str, str]) -> list[str]:
    """Values of the secret variables, longest first because one may contain another."""
    values = {
        value.strip()
        for name, value in environment.items()
        if SECRET_NAME.search(name) and not _NAMES_A_FILE.search(name)
    }
    return sorted((value for value in values if len(value) >= _MIN_LENGTH), key=len, reverse=True)


def find_secret(settings: Any) -> str | None:
    """The path of the first text with a secret in settings, such as `data.path`; None if there is none."""
    return next((redact(place) for place, text in _texts(settings, "") if redact(text) != text), None)


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            inside = f"{place}.{key}" if place else str(key)
            yield inside, str(key)
            yield from _texts(inner, inside)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{index}]")


class WithoutSecrets(logging.Filter):
    """A filter for log handlers that removes secrets, which libraries put into their errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every record, with secrets removed from its text and traceback."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text, record.exc_info = redact(record.exc_text), None
        return True
