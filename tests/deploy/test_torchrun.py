"""The command line of one node of many, and what surrounds it."""

import sys
from pathlib import Path

from deploy.launchers import torchrun
from deploy.launchers.torchrun import Rendezvous

MEETING = Rendezvous(
    nodes=2, endpoint="10.0.0.1:29500", job="a", host=False, address="10.0.0.2", interface="eth1", restarts=2
)


def test_a_node_of_many_is_told_where_the_others_are() -> None:
    assert torchrun.command(Path("job.json"), 4, MEETING) == [
        *(sys.executable, "-m", "dpo_core.training.run_torchrun"),
        *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:29500", "--rdzv-id=a"),
        *("--rdzv-conf=is_host=0", "--local-addr=10.0.0.2", "--max-restarts=2", "--nproc-per-node=4"),
        *("-m", "dpo_core.job", "--config", "job.json"),
    ]


def test_the_environment_lets_a_lost_node_be_replaced_and_names_the_interface() -> None:
    variables = torchrun.environment(MEETING)
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert variables["GLOO_SOCKET_IFNAME"] == "eth1"
    assert variables["PATH"].startswith(str(Path(sys.executable).parent))
    assert "GLOO_SOCKET_IFNAME" not in torchrun.environment()
