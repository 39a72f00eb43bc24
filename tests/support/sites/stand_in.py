"""Stands in for the interpreter on a cluster's nodes: a real process that does what its job file says.

It takes the command line of a node, whatever comes before `--config JOB`, and says which it was given.
"""

import contextlib
import stat
import sys
from pathlib import Path

import psutil

SOURCE = """#!{python}
import os, pathlib, signal, sys, time
job = pathlib.Path(sys.argv[sys.argv.index("--config") + 1])
work, what = job.parent, job.read_text()
rank = os.environ.get("PET_NODE_RANK") or "".join(a[12:] for a in sys.argv if a.startswith("--node-rank="))
print("node", rank or "?", *sys.argv[1:], flush=True)
with (work / "starts").open("a") as starts:
    starts.write(f"{{rank}} {{os.getpid()}}\\n")
if what == "done" or (what == "second time" and (work / "starts").read_text().count("\\n") > 1):
    if rank in ("", "0"):
        (work / "result.json").write_text("{{}}")
    sys.exit(0)
if what in ("fail", "second time"):
    sys.exit("the last words of a rank")
def stop(*_):
    (work / "stopped").touch()
    print("saved", flush=True)
    sys.exit(1)  # as torchrun, which answers 1 to every stop
signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "stubborn" else stop)
(work / "ready").touch()
while True:
    time.sleep(0.02)
"""


def write(folder: Path) -> str:
    """Write the interpreter; returns its path."""
    path = folder / "python-there"
    path.write_text(SOURCE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def job(folder: Path, what: str) -> Path:
    """A job file in a work folder of its own: done, fail, second time, wait, stubborn."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_text(what)
    return path


def starts(work: Path) -> list[int]:
    """Process ids of the nodes that were started, in order."""
    path = work / "starts"
    return [int(line.split()[1]) for line in path.read_text().splitlines()] if path.exists() else []


def alive(work: Path) -> list[int]:
    """The nodes that still run; one that nobody has collected does not."""
    found = []
    for pid in starts(work):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found
