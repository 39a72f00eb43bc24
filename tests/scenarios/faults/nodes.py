"""Two nodes on one machine: network namespaces joined by a cable, each with its own processes.

A node's processes live in a process namespace of their own, so that one kill ends all of them at once, as
when a machine loses its power. The disk is shared, as it is on a cluster.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deploy.launchers import torchrun

_ports = itertools.count(29500)


def why_not() -> str | None:
    """What this machine lacks for it; None when nothing."""
    if os.geteuid() != 0:
        return "two nodes on one machine need root, for network namespaces"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2 and util-linux"
    name = f"dpo-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


_REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass
class Node:
    """A running torchrun in a namespace."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """Everything on the node, at once, with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def torchrun(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def worker(self) -> psutil.Process:
        """The node's one rank."""
        return next(p for p in self.torchrun().children() if "--config" in p.cmdline())

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class TwoNodes:
    """The machine room; a context manager."""

    name: str = field(default_factory=lambda: f"dpo{os.getpid()}")
    running: list[Node] = field(default_factory=list)

    def __enter__(self) -> "TwoNodes":
        for end in "ab":
            self.ip("netns", "add", self.name + end)
        a, b = (f"{self.name}{end}" for end in "ab")
        self.ip("link", "add", f"w{a}", "netns", a, "type", "veth", "peer", "name", f"w{b}", "netns", b)
        for host, space in ((1, a), (2, b)):
            self.ip("-n", space, "address", "add", f"10.78.0.{host}/24", "dev", f"w{space}")
            self.ip("-n", space, "link", "set", f"w{space}", "up")
            self.ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for end in "ab":
            self.ip("netns", "delete", self.name + end)

    @staticmethod
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def cut(self) -> None:
        """Pull the cable: packets vanish and nobody is told."""
        self.ip("-n", self.name + "b", "link", "set", f"w{self.name}b", "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        self.ip("-n", self.name + "b", "link", "set", f"w{self.name}b", "up")

    def start(self, end: str, job: Path, port: int, restarts: int) -> Node:
        """The job's rank on node a or b; node a hosts the store of the rendezvous."""
        address, interface = f"10.78.0.{1 if end == 'a' else 2}", f"w{self.name}{end}"
        command = [
            *("ip", "netns", "exec", self.name + end),
            *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
            *(sys.executable, "-m", "dpo_core.training.run_torchrun"),
            *("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=10.78.0.1:{port}"),
            *(f"--rdzv-id={job.parent.name}", f"--rdzv-conf=is_host={int(end == 'a')}"),
            *(f"--local-addr={address}", f"--max-restarts={restarts}", "--nproc-per-node=1"),
            *("-m", "dpo_core.job", "--config", str(job)),
        ]
        variables = torchrun.environment() | {
            "PYTHONPATH": str(_REPOSITORY),
            "OMP_NUM_THREADS": "1",
            # If the store were shared, agents would remember its first address, and a new node never join.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
        }
        log = job.parent / f"node-{end}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
        node = Node(process, log)
        self.running.append(node)
        return node

    @staticmethod
    def port() -> int:
        return next(_ports)

    def end(self) -> None:
        """Kill what still runs."""
        for node in self.running:
            if node.process.poll() is None:
                node.kill()
        self.running.clear()


class Gang:
    """One job on both nodes."""

    def __init__(self, room: TwoNodes, job: Path, restarts: int = 0) -> None:
        self.room, self.job, self.restarts = room, job, restarts
        self.work, self.port = job.parent, room.port()
        self.a, self.b = self.start("a"), self.start("b")

    def start(self, end: str) -> Node:
        return self.room.start(end, self.job, self.port, self.restarts)

    def finish(self) -> None:
        for node in (self.a, self.b):
            assert node.process.wait(timeout=600) == 0, node.text()

    def left_after(self, node: Node) -> float:
        """Seconds until a node has ended by itself, with a failure."""
        start = time.monotonic()
        assert node.process.wait(timeout=600) != 0
        return time.monotonic() - start

    def error(self) -> dict[str, Any]:
        return json.loads((self.work / "error.json").read_text())
