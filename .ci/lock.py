"""Writes constraints.txt from pip's reports of installations: `python .ci/lock.py REPORT ...`."""

import json
import sys
from pathlib import Path

lines = set()
for path in sys.argv[1:]:
    for item in json.loads(Path(path).read_text())["install"]:
        package = item["metadata"]
        if not item["is_direct"]:  # the project itself
            # Without the build that the index of this machine prefers, such as +cpu.
            lines.add(f"{package['name']}=={package['version'].partition('+')[0]}")
Path("constraints.txt").write_text("\n".join(sorted(lines, key=str.lower)) + "\n")
