"""The order in which the nodes of a graph are trained, one or several at a time, and what a failure stops."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.train_policies import _each
from tasks.recipe.read import load_recipe
from tasks.recipe.study import PlannedPolicy
from tasks.signals import Stop

DPO: dict[str, Any] = {"method": "dpo"}


@pytest.fixture
def nodes(tmp_path: Path) -> list[PlannedPolicy]:
    """First, its follower, and three that need nothing; each with two seeds."""
    policies = {"First": DPO, "Follower": DPO | {"start": "First"}, "A": DPO, "B": DPO, "C": DPO}
    recipe = {"name": "mine", "data": {"path": "rows.jsonl"}, "reward": {"source": "sentiment"}}
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(recipe | {"policies": policies, "study": {"seeds": [0, 1]}}, sort_keys=False)
    )
    return load_recipe(str(path)).nodes()


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_results_come_in_the_order_of_the_nodes_and_a_node_has_those_that_it_needs(
    nodes: list[PlannedPolicy], parallel: int
) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def train(node: PlannedPolicy, earlier: Any) -> Any:
        nonlocal running, most
        assert [earlier[key] for key in node.needs] == [f"{name} {seed}" for name, seed in node.needs]
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05 if node.policy == "First" else 0.01)
        with lock:
            running -= 1
        return f"{node.policy} {node.seed}", []

    results = [name for name, _ in _each(nodes, train, parallel, Stop())]
    assert results == [f"{node.policy} {node.seed}" for node in nodes]
    assert most <= parallel
    assert (most > 1) == (parallel > 1)


@pytest.mark.parametrize("parallel", [1, 2])
def test_after_a_failure_nothing_begins_and_its_own_error_is_raised(
    nodes: list[PlannedPolicy], parallel: int
) -> None:
    """Also where the one before it lasts longer, and others wait for what failed."""
    begun = []

    def train(node: PlannedPolicy, earlier: Any) -> Any:
        begun.append(node.policy)
        if node.policy == "A":
            raise ValueError("no room")
        time.sleep(0.5 if node.policy == "Follower" else 0.05)
        return node.policy, []

    with pytest.raises(ValueError, match="no room"):
        list(_each(nodes, train, parallel, Stop()))
    assert sorted(begun) == ["A", "First", "Follower"]


def test_those_that_need_a_failed_node_do_not_hide_its_error(nodes: list[PlannedPolicy]) -> None:
    def train(node: PlannedPolicy, earlier: Any) -> Any:
        time.sleep(0.05)
        raise ValueError(node.policy)

    with pytest.raises(ValueError, match=r"^(First|A)$"):
        list(_each(nodes, train, 3, Stop()))
