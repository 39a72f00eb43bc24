"""Writes constraints.txt from pip's report of an installation: `python .ci/lock.py REPORT`."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
packages = [item["metadata"] for item in report["install"] if not item["is_direct"]]
# Without the build that the index of this machine prefers, such as +cpu.
lines = {f"{package['name']}=={package['version'].partition('+')[0]}" for package in packages}
Path("constraints.txt").write_text("\n".join(sorted(lines, key=str.lower)) + "\n")
