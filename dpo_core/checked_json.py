"""JSON files with a checksum: a file that a disk or a person has changed is detected and not used.

The first line is the SHA-256 of the second line, which is the JSON.
"""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_core.system import digest_text, remove, write_atomic

log = logging.getLogger("dpo")


def write_checked(path: Path, value: Any) -> None:
    """Write JSON with its checksum, completely or not at all; creates the folder."""
    text = json.dumps(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f"{digest_text(text)}\n{text}")


def read_checked(path: Path, consequence: str, *, keep: bool = False) -> Any | None:
    """The value of a file; None if there is no file. A damaged file is logged and removed.

    Args:
        consequence: what happens without the file, for the log line.
        keep: leave a damaged file where it is.
    """
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        if digest != digest_text(text):
            raise ValueError("its checksum does not match")
        with suppress(OSError):
            os.utime(path)  # `dpo gc` removes cached files that nothing has read for long
        return json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s); %s", path, error, consequence)
        if not keep:
            with suppress(OSError):
                remove(path)
        return None
