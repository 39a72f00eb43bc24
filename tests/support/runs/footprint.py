"""The command `dpo`, which at its end writes what it has loaded and its peak memory to $DPO_FOOTPRINT."""

import atexit
import json
import os
import re
import sys
from pathlib import Path


def _write() -> None:
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    facts = {
        "packages": sorted({name.partition(".")[0] for name in sys.modules}),
        "peak_bytes": int(peak[1]) * 1024 if peak else None,
    }
    Path(os.environ["DPO_FOOTPRINT"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    atexit.register(_write)  # first, so that it is called last
    import flows.cli.main as command

    sys.argv[0] = str(command.__file__)  # as `python -m flows.cli.main`

    command.main()
