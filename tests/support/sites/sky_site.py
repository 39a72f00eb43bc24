"""A small SkyPilot: its command `sky`, which keeps managed jobs in a folder and really runs their tasks.

The state lies in $SKY_SITE: a JSON file for each job, with the fields of SkyPilot's own records, and
`site.json`: refuse (what launch answers), lost (launch takes the job and fails), away (so many queues fail).
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SITE = Path(os.environ.get("SKY_SITE", "/nonexistent"))
OVER = ("SUCCEEDED", "FAILED", "CANCELLED", "FAILED_NO_RESOURCE", "FAILED_SETUP")


def install(folder: Path) -> Path:
    """Write the command; returns the folder for PATH."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    source = shlex.quote(str(Path(__file__).resolve()))
    (commands / "sky").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -S {source} "$@"\n')
    (commands / "sky").chmod(0o755)
    return commands


def site(folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    path = (folder or SITE) / "site.json"
    now = json.loads(path.read_text()) if path.exists() else {}
    if changes:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(now | changes))
        temporary.replace(path)
    return now


def jobs(folder: Path | None = None) -> list[dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in (folder or SITE).glob("job-*.json")]
    return sorted(found, key=lambda job: -job["job_id"])


def write(folder: Path, job: dict[str, Any], **changes: Any) -> None:
    path = folder / f"job-{job['job_id']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(job | changes))
    path.with_suffix(".tmp").replace(path)


def launch(arguments: list[str]) -> str:
    assert arguments[0] == "--name"
    assert arguments[2:4] == ["--detach-run", "--yes"]
    for name in arguments[5:-1:2]:
        assert name in os.environ, "a secret is given by name and found in the environment"
    if site().get("refuse"):
        fail(site()["refuse"])
    # Commands start without installed packages (-S), which would take most of their time.
    import site as packages

    packages.main()
    import yaml

    task = yaml.safe_load(Path(arguments[-1]).read_text())
    number = 1 + len(jobs())
    row = {"job_id": number, "job_name": arguments[1], "status": "PENDING", "failure_reason": None}
    write(SITE, row | {"task": task})
    subprocess.Popen(
        [sys.executable, __file__, "controller", str(number)], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    if site().get("lost"):
        fail("requests.exceptions.ConnectionError: the API server closed the connection")
    return f"Managed job ID: {number}\n"


def queue(arguments: list[str]) -> str:
    assert arguments == ["--all", "--output", "json"]
    if site().get("away"):
        site(away=site()["away"] - 1)
        fail("sky.exceptions.ApiServerConnectionError: Could not connect to SkyPilot API server")
    return json.dumps(jobs())


def cancel(arguments: list[str]) -> str:
    assert arguments[:2] == ["--yes", "--graceful"]
    assert re.fullmatch(r"--graceful-timeout=\d+", arguments[2])
    (SITE / f"cancel-{arguments[3]}").touch()
    return ""


def logs(arguments: list[str]) -> str:
    assert arguments[0] == "--no-follow"
    path = SITE / f"log-{arguments[1]}"
    return path.read_text() if path.exists() else ""


def controller(number: int) -> None:
    (job,) = [job for job in jobs() if job["job_id"] == number]
    task, left = job["task"], job["task"]["resources"]["job_recovery"]["max_restarts_on_errors"]
    nodes = task["num_nodes"]
    while True:
        environment = os.environ | task["envs"] | {
            "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes),
        }  # fmt: skip
        with (SITE / f"log-{number}").open("ab") as output:
            tasks = [
                subprocess.Popen(
                    ["bash", "-c", task["run"]], stdout=output, stderr=subprocess.STDOUT,
                    env=environment | {"SKYPILOT_NODE_RANK": str(rank)}, start_new_session=True,
                )
                for rank in range(nodes)
            ]  # fmt: skip
        write(SITE, job, status="RUNNING")
        fate = watch(number, tasks)
        if fate == "FAILED" and left:
            left -= 1
        elif fate != "RECOVERING":
            write(SITE, job, status=fate, failure_reason=site().get("reason") if "FAILED" in fate else None)
            return
        write(SITE, job, status="RECOVERING", details="Preempted")
        time.sleep(0.5)


def watch(number: int, tasks: list[subprocess.Popen[bytes]]) -> str:
    """Until the job is over: SUCCEEDED, FAILED, CANCELLED, or what the test wants of it."""
    while None in [task.poll() for task in tasks]:
        time.sleep(0.02)
        if site().get("fate"):
            fate = site()["fate"]
            site(fate=None)
            end(tasks, signal.SIGKILL)
            return str(fate)
        if (SITE / f"cancel-{number}").exists():
            end(tasks, signal.SIGTERM)
            return "CANCELLED"
        if any(task.poll() for task in tasks):
            end(tasks, signal.SIGKILL)
    return "FAILED" if any(task.returncode for task in tasks) else "SUCCEEDED"


def end(tasks: list[subprocess.Popen[bytes]], first: int) -> None:
    for number, wait in ((first, 1.0), (signal.SIGKILL, 5.0)):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)
        limit = time.monotonic() + wait
        while None in [task.poll() for task in tasks] and time.monotonic() < limit:
            time.sleep(0.02)


def fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "controller":
        controller(int(sys.argv[2]))
    else:
        assert sys.argv[1] == "jobs"
        verbs = {f.__name__: f for f in (launch, queue, cancel, logs)}
        sys.stdout.write(verbs[sys.argv[2]](sys.argv[3:]))
