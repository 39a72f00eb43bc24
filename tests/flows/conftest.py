"""What several tests of whole runs share."""

from typing import Any

import pytest
import yaml

from tests.flows.cli.test_plan import planned, reasons
from tests.support.runs.tiny_run import ENGINE, SIZES, Bench

ROUNDS = {"iterations": 2, "episodes": 8, "micro_batch_size": 8, "epochs": 1, "engine": ENGINE}
# Listed so that each stands before what it needs.
MORE: dict[str, Any] = {
    "Last": {"method": "dpo", "start": "GRPO", "reference": "DPO", **SIZES},
    "Pre-DPO": {"method": "dpo", "reference": "DPO", **SIZES},
    "GRPO": {"method": "grpo", "start": "DPO", "group_size": 4, **ROUNDS},
    "Online DPO": {"method": "online_dpo", "renew_reference": True, **ROUNDS, "micro_batch_size": 4},
}


@pytest.fixture(scope="session")
def graph(finished: tuple[Bench, dict[str, Any]]) -> tuple[Bench, dict[str, Any], dict[str, str]]:
    """A finished run's workspace after a run with four more policies and a learned reward for PPO.

    With its report, and with what was planned.
    """
    bench = finished[0].copy("graph")
    recipe = yaml.safe_load(bench.recipe.read_text())
    recipe["policies"] = MORE | recipe["policies"]
    recipe["policies"]["PPO"]["reward"] = "model"
    recipe["reward"]["model"] = {key: SIZES[key] for key in SIZES if key != "epochs"}
    recipe["candidate"] = "GRPO"
    bench.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))
    foretold = reasons(planned(bench))
    return bench, bench.run(), foretold
