"""The launcher for SLURM: runs a job as one batch job with one torchrun per node, by sbatch and squeue.

submitit (1.5) does not do, by its source: its jobs ignore SIGTERM, so that a cancelled one would not save, it
asks sacct alone, which many clusters do not have, and it does not find a job again by its name.

The workspace must be on a file system that this machine and the nodes share.
"""

import logging
import re
import shlex
import time
from pathlib import Path

from pydantic import Field, field_validator

from deploy.launchers import cluster, torchrun
from deploy.launchers.base import LOG, State, command_end, final_state, tail
from deploy.launchers.cluster import ClusterConfig, ClusterLauncher, Handle, require_command
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.system import write_atomic

log = logging.getLogger("dpo")

TIMEOUT = 60.0
"""Maximum seconds of one command; the controller of a busy cluster is slow."""
LOGIN = "Run on a login node of the SLURM cluster"
_KILL_WAIT = 60.0
"""Seconds beyond the grace time: SLURM kills after its KillWait (30), then runs its epilogs."""

_WAITS = {
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT"),
    *("STOPPED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
}
_ENDS = {
    "BOOT_FAIL": "a node did not boot",
    "CANCELLED": "cancelled",
    "DEADLINE": "its deadline could not be met",
    "LAUNCH_FAILED": "a node could not start it",
    "NODE_FAIL": "a node was lost",
    "OUT_OF_MEMORY": "out of memory: a node exceeded its memory limit",
    "PREEMPTED": "preempted by a job of higher priority",
    "RECONFIG_FAIL": "a node could not be configured",
    "REVOKED": "moved to another cluster",
    "TIMEOUT": "it exceeded its time limit",
}
_QUOTAS = re.compile(r"QOS|Assoc|accounting/QOS policy|limit", re.IGNORECASE)


class SlurmConfig(ClusterConfig):
    """Settings of jobs on SLURM."""

    partition: str | None = None
    """Partition; empty: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclusive: bool = True
    """Share no node with other jobs."""
    grace_seconds: int = Field(120, ge=30)
    """Seconds before the time limit at which the job saves and is queued again."""
    setup: str = ""
    """Shell lines that put the right `python` on PATH: module load, source .../activate."""
    options: list[str] = Field([])
    """Additional options of sbatch, such as --reservation=NAME."""

    @field_validator("partition", "account", "qos", "constraint")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        # After a line break, the rest would be a command of the batch script.
        if value is not None and not value.isprintable():
            raise ValueError("it contains a line break or another character that cannot be printed")
        return value

    @field_validator("options")
    @classmethod
    def _options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not re.fullmatch(r"--[a-z][-a-z]*(=.*)?", option) or not option.isprintable():
                raise ValueError(f"write options of sbatch as --name or --name=value, not '{option}'")
        return options


class SlurmLauncher(ClusterLauncher):
    """Launches a job by sbatch."""

    pause = 10.0
    config: SlurmConfig

    def render(self, job: Path, processes: int) -> str:
        """The batch script.

        Raises:
            RecipeError: the job has more ranks than GPUs, or its path contains a line break.
        """
        self.config.check(processes)
        return self._script(job.absolute(), processes)

    def _script(self, job: Path, processes: int) -> str:
        if not str(job).isprintable():
            raise RecipeError(
                f"the job's folder {str(job.parent)!r} contains a character that cannot be printed",
                "Choose another workspace",
            )
        return _script(self.config, self.name, job, processes)

    def require_client(self) -> None:
        require_command("sbatch", LOGIN)

    def find(self, work: Path) -> str | None:
        record = self._record(work)
        if record.exists():
            return record.read_text()
        queued = _run("squeue", "--me", "--noheader", "--format=%i", f"--name={self.name}")
        # Jobs of the last month; without a start time sacct lists only today's.
        past = ("--format=JobIDRaw", "--starttime=now-30days", f"--name={self.name}")
        ids = queued.split() or _accounting(*past).split()
        return str(Handle(ids[-1], work)) if ids else None

    def start(self, job: Path, processes: int, work: Path) -> str:
        script = self._script(job, processes)
        (work / f"{self.name}.sbatch").write_text(script)
        try:
            number = _run("sbatch", "--parsable", text=script).strip().split(";")[0]
        except StageFailed as error:
            if not _QUOTAS.search(error.problem):
                raise
            remedy = "Request less, wait for other jobs, or choose another account or QOS"
            raise StageFailed(f"quota exceeded: {error.problem}", remedy) from error
        handle = str(Handle(number, work))
        write_atomic(self._record(work), handle)
        return handle

    def _record(self, work: Path) -> Path:
        """The file of the handle, because not every cluster keeps accounts of ended jobs."""
        return work / f"{self.name}.handle"

    def poll(self, handle: str) -> State:
        number, work = Handle.parse(handle)
        state, _, _ = _status(number)
        return State.RUNNING if state in _WAITS else final_state(work)

    def why(self, handle: str) -> str:
        number, _ = Handle.parse(handle)
        state, exit_code, reason = _status(number)
        if state == "PENDING":
            quota = "quota exceeded, " if _QUOTAS.search(reason) else ""
            return f"{quota}waiting in the queue: {reason}" if reason else "waiting in the queue"
        if not state:
            return "SLURM does not know the job any more"
        return command_end(exit_code) if state == "FAILED" else _ENDS.get(state, "")

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        """Have the batch script stop the ranks, which save; SLURM kills them after the grace time."""
        number, _ = Handle.parse(handle)
        state, _, _ = _status(number)
        if state not in _WAITS:
            return
        if state in {"RUNNING", "SUSPENDED"}:
            _run("scancel", "--batch", "--signal=TERM", number, check=False)
            if _ends_within(number, grace):
                return
        _run("scancel", number, check=False)
        if not _ends_within(number, _KILL_WAIT):
            log.warning("SLURM job %s does not end; check it with: scontrol show job %s", number, number)

    def logs(self, handle: str, lines: int = 50) -> str:
        return tail(Handle.parse(handle).work, lines)


def _script(config: SlurmConfig, name: str, job: Path, processes: int) -> str:
    minutes = f"--time={max(1, round(config.hours * 60))}" if config.hours else ""
    directives = [
        f"--job-name={name}",
        f"--nodes={config.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={config.gpus}" if config.gpus else "",
        f"--cpus-per-task={config.cpus}" if config.cpus else "",
        f"--mem={config.memory_gib}G" if config.memory_gib else "",
        minutes,
        f"--partition={shlex.quote(config.partition)}" if config.partition else "",
        f"--account={shlex.quote(config.account)}" if config.account else "",
        f"--qos={shlex.quote(config.qos)}" if config.qos else "",
        f"--constraint={shlex.quote(config.constraint)}" if config.constraint else "",
        "--exclusive" if config.exclusive else "",
        "--requeue",
        f"--signal=B:USR1@{config.grace_seconds}",
        "--open-mode=append",
        f"--output={shlex.quote(str(job.parent / LOG).replace('%', '%%'))}",
        *config.options,
    ]
    variables = torchrun.NODE_ENVIRONMENT | config.environment
    start = torchrun.node_command(job, python=config.python)
    meeting = (
        f'--nnodes="$SLURM_NNODES" --nproc-per-node={processes} --node-rank="$SLURM_NODEID" '
        '--master-addr="$HEAD" --master-port="$PORT"'
    )
    command = f"exec {shlex.join(start[:3])} {meeting} {shlex.join(start[3:])}"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in directives if directive),
        *(f"export {key}={shlex.quote(value)}" for key, value in variables.items()),
        # Result files of an earlier start, if the job was queued again.
        f"rm -f {shlex.quote(str(job.parent / 'stopped'))} {shlex.quote(str(job.parent / 'error.json'))}",
        *config.setup.splitlines(),
        'export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# Jobs on the same node need different ports. Linux assigns those from 32768 on itself.",
        "export PORT=$((20000 + SLURM_JOB_ID % 12000))",
    ]
    if config.cpus:
        lines.append('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"')
    return "\n".join(lines) + "\n" + _WATCH.replace("COMMAND", shlex.quote(command))


# SLURM sends TERM at a cancel or preemption, and USR1 before the time limit. The ranks save in both cases.
_WATCH = """\
srun --kill-on-bad-exit=1 bash -c COMMAND &
step=$!
again=
trap 'kill -TERM $step' TERM
trap 'again=1; kill -TERM $step' USR1
wait $step
status=$?
while kill -0 $step 2>/dev/null; do wait $step; status=$?; done
if [ -n "$again" ] && [ $status -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID" && sleep 60; fi
exit $status
"""


def _run(*command: str, text: str | None = None, check: bool = True) -> str:
    """The output of a command of SLURM."""
    return cluster.run_command(*command, remedy=LOGIN, timeout=TIMEOUT, text=text, check=check).stdout


def _accounting(*options: str) -> str:
    """sacct's output; empty if the cluster keeps no accounts."""
    return _run("sacct", "--noheader", "--allocations", "--parsable2", *options, check=False)


def _queued(number: str) -> str:
    """squeue's state of a job and reason for waiting, `STATE|REASON`; empty if it does not know the job."""
    try:
        return _run("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T|%r").strip()
    except StageFailed as error:
        if "Invalid job id" in error.problem:
            return ""
        raise


def _status(number: str) -> tuple[str, str, str]:
    """A job's state, exit status and reason for waiting; empty if SLURM no longer knows it.

    squeue knows a job until some minutes after its end. sacct knows it for months, but only if accounts are
    kept, and some seconds late.
    """
    now, _, reason = cluster.patiently("SLURM", lambda: _queued(number)).partition("|")
    if now in _WAITS:
        return now, "", "" if reason == "None" else reason
    state, _, exit_code = _accounting("--format=State,ExitCode", f"--jobs={number}").strip().partition("|")
    state = state.partition(" ")[0]  # CANCELLED by 1000
    # Accounts lag behind, and a job whose end was never recorded stays RUNNING there for ever.
    if not state or state in _WAITS:
        state = now
    return state, exit_code.partition(":")[0] or "unknown", ""


def _ends_within(number: str, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while _status(number)[0] in _WAITS:
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True
