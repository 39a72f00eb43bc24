"""A small SLURM on one machine: its commands, and a controller for each job that really runs the script.

Every command is this file under its own name. The state lies in the folder $SLURM_SITE: a JSON file for each
job, and `site.json` with what the site does beyond running jobs:

    reject: what sbatch answers instead;  lost: sbatch takes the job and times out;  away: so many squeue fail
    hold: reason for which jobs wait;  accounts: false, and sacct has none;  slow: seconds of every command
    limit: the first start is warned of its time limit;  kill_wait: seconds between TERM and KILL
"""

import contextlib
import fcntl
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

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun")
DIRECTIVES = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "partition"),
    *("account", "qos", "constraint", "exclusive", "requeue", "signal", "open-mode", "output", "reservation"),
}
SITE = Path(os.environ.get("SLURM_SITE", "/nonexistent"))
WAITS = ("PENDING", "RUNNING", "REQUEUED")


def install(folder: Path) -> Path:
    """Write the commands; returns the folder for PATH."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name in COMMANDS:
        path = commands / name
        source = shlex.quote(str(Path(__file__).resolve()))
        # -S: installed packages would take most of the time of a command.
        path.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -S {source} {name} "$@"\n')
        path.chmod(0o755)
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
    return sorted(found, key=lambda job: job["id"])


def update(number: int, folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Change a job's record; all processes may do so at once."""
    path = (folder or SITE) / f"job-{number}.json"
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = (json.loads(path.read_text()) if path.exists() else {}) | changes
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(job))
        temporary.replace(path)
    return job


def sbatch(arguments: list[str]) -> str:
    script = sys.stdin.read()
    options: dict[str, str] = {}
    for line in re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE):
        (one,) = shlex.split(line)
        name, _, value = one.removeprefix("--").partition("=")
        if name not in DIRECTIVES:
            fail(f"sbatch: unrecognized option '--{name}'")
        options[name] = value
    if arguments != ["--parsable"] or not script.startswith("#!"):
        fail("sbatch: error: This does not look like a batch script.")
    if site().get("reject"):
        fail(f"sbatch: error: Batch job submission failed: {site()['reject']}")
    number = 1 + len(jobs())
    Path(SITE / f"script-{number}").write_text(script)
    update(number, id=number, options=options, state="PENDING", reason="Priority", exit="0:0", starts=0)
    subprocess.Popen(
        [sys.executable, __file__, "controller", str(number)], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(SITE / "controller.log").open("a"),
    )  # fmt: skip
    if site().get("lost"):
        fail("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    return f"{number}\n"


def squeue(arguments: list[str]) -> str:
    if site().get("away"):
        site(away=site()["away"] - 1)
        fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    options = parsed(arguments)
    names, ids = options.get("name"), options.get("jobs")
    found = [j for j in jobs() if names in (None, j["options"]["job-name"]) and ids in (None, str(j["id"]))]
    if ids and not [job for job in found if not job.get("purged")]:
        fail("slurm_load_jobs error: Invalid job id specified")
    if options.get("states") != "all":
        found = [job for job in found if job["state"] in WAITS]
    shape = options["format"]
    return "".join(
        shape.replace("%i", str(j["id"])).replace("%T", j["state"]).replace("%r", j["reason"]) + "\n"
        for j in found
        if not j.get("purged")
    )


def sacct(arguments: list[str]) -> str:
    if site().get("accounts") is False:
        fail("Slurm accounting storage is disabled")
    options = parsed(arguments)
    fields = {"JobIDRaw": "id", "State": "state", "ExitCode": "exit"}
    said = {"CANCELLED": "CANCELLED by 1000"}
    return "".join(
        "|".join(said.get(str(job[fields[f]]), str(job[fields[f]])) for f in options["format"].split(","))
        + "\n"
        for job in jobs()
        if options.get("name") in (None, job["options"]["job-name"])
        and options.get("jobs") in (None, str(job["id"]))
    )


def scancel(arguments: list[str]) -> str:
    number = int(arguments[-1])
    job = next((j for j in jobs() if j["id"] == number), None)
    if job is None:
        fail(f"scancel: error: Kill job error on job id {number}: Invalid job id specified")
    assert job is not None
    if "--signal=TERM" in arguments:
        assert "--batch" in arguments
        os.kill(job["batch"], signal.SIGTERM)
    else:
        update(number, fate="CANCELLED")
    return ""


def scontrol(arguments: list[str]) -> str:
    if arguments[:2] == ["show", "hostnames"]:
        return arguments[2].replace(",", "\n") + "\n"
    assert arguments[0] == "requeue"
    update(int(arguments[1]), fate="REQUEUED")
    return ""


def srun(arguments: list[str]) -> str:
    """The command once for each node, all on this one; SIGTERM is handed on, a bad end ends the others."""
    while arguments[0].startswith("--"):
        assert arguments.pop(0) in ("--kill-on-bad-exit=1",)
    tasks = [
        subprocess.Popen(arguments, env=os.environ | {"SLURM_NODEID": str(node)})
        for node in range(int(os.environ["SLURM_NNODES"]))
    ]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    worst = 0
    for task in tasks:
        code = task.wait()
        worst = max(worst, 128 - code if code < 0 else code)
    sys.exit(worst)


def controller(arguments: list[str]) -> str:
    if group := os.environ.get("SLURM_SITE_GROUP"):  # the control group of the cluster, not of who submits
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    number = int(arguments[0])
    while True:
        if not wait_for_turn(number):
            break
        again = run_once(number)
        if not again:
            break
    return ""


def wait_for_turn(number: int) -> bool:
    while True:
        hold = site().get("hold")
        job = update(number, state="PENDING", reason=hold or "Priority")
        if job.get("fate"):
            update(number, state=job["fate"])
            return False
        if not hold:
            return True
        time.sleep(0.02)


def run_once(number: int) -> bool:
    job = update(number, state="RUNNING", reason="None")
    options, starts = job["options"], job["starts"] + 1
    nodes = int(options["nodes"])
    environment = os.environ | {
        "SLURM_JOB_ID": str(number),
        "SLURM_NNODES": options["nodes"],
        "SLURM_JOB_NODELIST": ",".join(["127.0.0.1"] * nodes),
        "SLURM_RESTART_COUNT": str(starts - 1),
    }
    with Path(options["output"].replace("%%", "%")).open("ab") as output:
        batch = subprocess.Popen(
            ["bash", str(SITE / f"script-{number}")],
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
    update(number, batch=batch.pid, starts=starts)
    warned = False
    while batch.poll() is None:
        time.sleep(0.02)
        if not warned and starts == 1 and site().get("limit"):
            assert options["signal"].startswith("B:USR1@")
            batch.send_signal(signal.SIGUSR1)
            warned = True
        fate = update(number).get("fate")
        if fate:
            end(batch, site().get("kill_wait", 0.5) if fate in ("CANCELLED", "TIMEOUT", "PREEMPTED") else 0)
            # Only a job that may be is queued again.
            again = fate == "REQUEUED" or (
                fate == "NODE_FAIL" and "requeue" in options and not site().get("last")
            )
            state = "PENDING" if again else fate
            update(number, state=state, exit="0:15", reason="BeginTime", fate=None)
            return again
    code = batch.returncode
    update(number, state="FAILED" if code else "COMPLETED", exit=f"{code}:0")
    return False


def end(batch: subprocess.Popen[bytes], wait: float) -> None:
    """TERM to the steps, KILL to all that is left, as a cgroup would."""
    import psutil  # only the controller starts with installed packages

    family = [psutil.Process(batch.pid), *psutil.Process(batch.pid).children(recursive=True)]
    if wait:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    psutil.wait_procs(family[1:], timeout=wait)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # What was started since the family was listed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(batch.pid, signal.SIGKILL)
    batch.wait()


def parsed(arguments: list[str]) -> dict[str, str]:
    return {a.removeprefix("--").partition("=")[0]: a.partition("=")[2] for a in arguments}


def fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    time.sleep(site().get("slow", 0))
    verbs = {f.__name__: f for f in (sbatch, squeue, sacct, scancel, scontrol, srun, controller)}
    sys.stdout.write(verbs[sys.argv[1]](sys.argv[2:]))
