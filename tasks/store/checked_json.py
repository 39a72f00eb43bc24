"""Small JSON files with a digest of their own: what a disk or a hand has changed is noticed and not used.

The first line is the digest of the second, which is the JSON.
"""

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.store.files import remove, write_whole

log = logging.getLogger("dpo")


def write_sealed(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(value)
    write_whole(path, f"{_digest(text)}\n{text}")


def read_sealed(path: Path, then: str) -> Any | None:
    """What was written; None where there is nothing. A damaged file is removed, and told in one line.

    Args:
        then: what is done without it, for that line.
    """
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        if digest != _digest(text):
            raise ValueError("its digest does not match")
        return json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s); %s", path, error, then)
        with suppress(OSError):
            remove(path)
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
