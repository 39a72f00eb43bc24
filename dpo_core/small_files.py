"""Files that people write by hand, such as recipes and templates: read whole, but not without end."""

import errno
import os
import stat
from pathlib import Path

MOST_BYTES = 2**20
"""A recipe has some thousand bytes, the longest chat template of a known model about twenty thousand."""


def read_small(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be opened, is no regular file (a device or a pipe may never end), or has more than
            `MOST_BYTES`.
        UnicodeDecodeError: it is not UTF-8.
    """
    # Not to wait for somebody to write where it is a pipe.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MOST_BYTES // 2**20} MiB", str(path))
    return content.decode("utf-8")
