"""How much the score of each method out of domain depends on the reward that it learned from.

    python -m tests.benchmarks.reward_variance RUN RUN [RUN ...]

Each RUN is the folder of a finished run of the recipe `scenes` with another `reward.source`. The variance is
that of the score over the rewards, in squared percentage points. Tong et al. (2025, arXiv 2505.17017) claim
that DPO's (0.9547) is larger than GRPO's (0.5486).
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dpo_core.statistics.estimates import Estimate, bootstrap_statistic
from tasks.recipe.read import load_recipe
from tasks.runs.references import LIST
from tasks.stages.suites import SUITES, load_suites
from tasks.store.store import Store

SUITE, MEASURE = "scenes_gen", "score"
Scores = dict[str, list[float]]


def variance(*scores: ArrayLike) -> float:
    """Of the means of the columns, one for each reward; in squared percentage points."""
    return float(np.var([100 * np.mean(column) for column in scores], ddof=1))


def variances(by_reward: list[Scores]) -> dict[str, Estimate]:
    """Each policy's variance, and the difference of DPO's and GRPO's; intervals by prompt.

    Args:
        by_reward: for each reward the item scores of each policy, of the same prompts in the same order.
    """
    columns = {name: [scores[name] for scores in by_reward] for name in by_reward[0] if name != "SFT"}
    found = {
        name: bootstrap_statistic(variance, arrays, interval="basic") for name, arrays in columns.items()
    }
    count = len(by_reward)
    found["DPO - GRPO"] = bootstrap_statistic(
        lambda *arrays: variance(*arrays[:count]) - variance(*arrays[count:]),
        columns["DPO"] + columns["GRPO"],
        interval="basic",
    )
    return {name: estimate for name, estimate in found.items() if estimate}


def read_scores(run: Path) -> tuple[str, Scores]:
    """The reward of a run, and the item scores of its policies on the suite."""
    store = Store(run.parent.parent)
    scores: Scores = {}
    for line in map(json.loads, (run / LIST).read_text().splitlines()):
        manifest = store.peek(line["stage"], line["key"]) if line["stage"] == SUITES.name else None
        for result in load_suites(manifest) if manifest else ():
            if result.suite == SUITE:
                scores[result.model] = [item.values[MEASURE] for item in result.items]
    return str(load_recipe(str(run / "recipe.yaml")).reward.source), scores


def main(folders: list[str]) -> None:
    """Print the scores and the variances."""
    runs = dict(read_scores(Path(folder)) for folder in folders)
    for reward, scores in runs.items():
        print(reward, {name: round(float(np.mean(values)), 3) for name, values in scores.items()})
    for name, estimate in variances(list(runs.values())).items():
        print(f"{name}: {estimate}")


if __name__ == "__main__":
    main(sys.argv[1:])
