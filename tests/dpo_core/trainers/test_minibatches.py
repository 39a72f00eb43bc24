"""The assignment of episodes to minibatches is random and depends on no length, rank or micro-batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpo_core import job as train
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.trainers.online.rollouts import Episode, split_minibatches
from tests.support.runs.online_jobs import online_job
from tests.support.runs.training_jobs import curve


def episodes(prompts: int, each: int = 1, rank: int = 0, world: int = 1) -> list[Episode]:
    """A rank's share; longer in the order of the prompts. The prompt's first token is its number."""
    return [
        Episode(TokenSequence((p,), tuple(range(1, p + 2))), "", i, True, (), sample=k)
        for i, p in enumerate(range(rank, prompts, world))
        for k in range(each)
    ]


def names(minibatch: list[Episode]) -> set[tuple[int, int]]:
    return {(e.sequence.prompt[0], e.sample) for e in minibatch}


@pytest.mark.parametrize(("prompts", "each", "minibatches"), [(24, 1, 4), (8, 6, 4), (4, 8, 2), (12, 2, 1)])
def test_the_number_of_ranks_changes_no_minibatch(prompts: int, each: int, minibatches: int) -> None:
    def dealt(world: int) -> list[set[tuple[int, int]]]:
        shares = [
            split_minibatches(
                episodes(prompts, each, rank, world), minibatches, key=(7, 3, 1), rank=rank, world=world
            )
            for rank in range(world)
        ]
        assert {len(share) for ranks in shares for share in ranks} == {prompts * each // minibatches // world}
        return [set().union(*map(names, parts)) for parts in zip(*shares, strict=True)]

    alone = dealt(1)
    assert set().union(*alone) == {(p, k) for p in range(prompts) for k in range(each)}
    for world in (2, 4):
        if not prompts % world and not prompts * each // minibatches % world:
            assert dealt(world) == alone


def test_every_minibatch_is_as_long_as_the_others() -> None:
    """Over many deals: no minibatch gets the short episodes, and each pass deals anew."""
    means = np.array(
        [
            [
                np.mean([len(e) for e in m])
                for m in split_minibatches(episodes(32), 4, key=(0, i, 0), rank=0, world=1)
            ]
            for i in range(200)
        ]
    )
    assert stats.f_oneway(*means.T).pvalue > 1e-3
    assert np.ptp(means.mean(0)) < 1, "sorted by length they would be 24 apart"
    first, second = (
        split_minibatches(episodes(32), 4, key=(0, 0, epoch), rank=0, world=1) for epoch in (0, 1)
    )
    assert [names(m) for m in first] != [names(m) for m in second]


def test_samples_of_a_prompt_are_spread_over_the_minibatches() -> None:
    for minibatch in split_minibatches(episodes(4, each=8), 2, key=(0, 0, 0), rank=0, world=1):
        assert np.bincount([e.sequence.prompt[0] for e in minibatch]).tolist() == [4, 4, 4, 4]


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"critic_optim": {"learning_rate": 1e-3, "epsilon": 1e-5}}),
    "ppo_after_last": ("ppo", {"score_at": "after_last", "whiten_rewards": True}),
    "grpo": ("grpo", {"group_size": 4}),
    "rloo": ("grpo", {"group_size": 4, "variant": "rloo"}),
    "dapo": ("grpo", {"group_size": 4, "variant": "dapo", "mask_truncated": True}),
    "online_dpo": ("online_dpo", {"samples_per_prompt": 2}),
}


# Padding, clock times, and the sign of margins that are 0 while the policy is the reference.
SIZE_DECIDES = {"flops", "seconds_per_step", "time", "tokens_per_second", "rewards/accuracies"}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=pytest.mark.slow if m in ("ppo_after_last", "grpo", "rloo") else ())
        for m in METHODS
    ],
)
def test_micro_batches_change_nothing(alone: None, tiny: Path, tmp_path: Path, method: str) -> None:
    """With several passes and several minibatches too."""
    kind, own = METHODS[method]
    courses = []
    for size in (2, 4):
        settings = {
            "iterations": 2,
            "episodes": 16,
            "epochs": 2,
            "minibatches": 2,
            "micro_batch_size": size,
            # A tiny epsilon would blow the last bit of a gradient near zero up to a whole step.
            "optim": {"learning_rate": 1e-3, "schedule": "constant", "epsilon": 1e-3},
        }
        job = online_job(tmp_path / str(size), tiny, kind, settings | own)
        assert train.main(["--config", str(job)]) == 0
        courses.append(curve(job.parent))
    for course in courses[1:]:
        for ours, theirs in zip(course, courses[0], strict=True):
            for name in theirs.keys() - SIZE_DECIDES:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
