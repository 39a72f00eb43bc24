"""Which process is which: a number is given again, and a clock is set."""

from pathlib import Path

import psutil


def birth(pid: int) -> int:
    """When a process was born, on a clock that nobody sets: the same number whenever it is asked for.

    psutil's `create_time` is a time of day, and moves when the clock of the machine is set.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    try:
        # Its name, which may hold anything, ends at the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        raise psutil.NoSuchProcess(pid) from None
    except OSError:  # there is no such process, or no /proc
        return int(psutil.Process(pid).create_time())
    return int(fields[19])
