"""Online and iterative DPO: the loss at the start of a round, ties, learning, exact resume."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from deploy.launchers import State
from dpo_core import job as train
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.trainers.online.rollouts import Episode
from dpo_core.trainers.online_dpo import ScoredEpisode, best_and_worst
from tests.support.runs.online_jobs import online_job, train_in_parts
from tests.support.runs.training_jobs import build_trainer, curve, launch, timeless

SETTINGS: dict[str, Any] = {
    "iterations": 3,
    "episodes": 32,
    "samples_per_prompt": 4,
    "micro_batch_size": 4,
    "parameters": {"beta": 0.1},
}


def online(work: Path, tiny: Path, **changes: Any) -> Path:
    return online_job(work, tiny, "online_dpo", SETTINGS | changes)


def test_every_round_starts_at_ln_2_where_the_reference_is_its_policy(
    alone: None, tiny: Path, tmp_path: Path
) -> None:
    job = online(tmp_path, tiny, renew_reference=True)
    assert train.main(["--config", str(job)]) == 0
    for line in curve(tmp_path):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert line["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert line["rewards/accuracies"] < 1
        assert 0 < line["pairs"] <= 8


def test_with_a_fixed_reference_only_the_first_round_does(alone: None, tiny: Path, tmp_path: Path) -> None:
    job = online(tmp_path, tiny)
    assert train.main(["--config", str(job)]) == 0
    first, *others = curve(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(abs(line["loss"] - math.log(2)) > 1e-4 for line in others)


def test_a_reward_that_can_be_learnt_is_learnt(alone: None, tiny: Path, tmp_path: Path) -> None:
    job = online(tmp_path, tiny, iterations=12, episodes=64, micro_batch_size=16, min_gap=0.5, epochs=2)
    assert train.main(["--config", str(job)]) == 0
    scores = [line["objective/scores"] for line in curve(tmp_path)]
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.5


@pytest.mark.parametrize("renew", [False, True])
def test_a_resumed_run_is_the_straight_one(alone: None, tiny: Path, tmp_path: Path, renew: bool) -> None:
    changes = {"renew_reference": renew, "iterations": 4, "epochs": 2, "minibatches": 2}
    straight = build_trainer(online(tmp_path / "straight", tiny, **changes))
    straight.train()
    resumed = train_in_parts(online(tmp_path / "parts", tiny, **changes), first=2)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "straight")
    ours, theirs = resumed.module.state_dict(), straight.module.state_dict()
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tiny: Path, tmp_path: Path) -> None:
    steps = {"micro_batch_size": 2, "epochs": 2, "minibatches": 2}
    two = online(tmp_path / "two", tiny, engine={"processes": 2}, **steps)
    one = online(tmp_path / "one", tiny, **steps)
    assert launch(two, processes=2) is State.DONE
    assert launch(one) is State.DONE
    for ours, theirs in zip(curve(two.parent), curve(one.parent), strict=True):
        for name in ("loss", "grad_norm", "pairs", "rewards/margins", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def candidate(reward: float, *completion: int) -> ScoredEpisode:
    return ScoredEpisode(Episode(TokenSequence((1,), completion), "", 0, True, (0.0,)), reward, -1.0)


def test_the_best_is_paired_with_the_worst() -> None:
    candidates = [candidate(0.5, 2), candidate(2.0, 3), candidate(-1.0, 4), candidate(2.0, 5)]
    better, worse = best_and_worst(candidates)
    assert (better.episode.sequence.completion, worse.score) == ((3,), -1.0)


def test_ties_teach_nothing(alone: None, tiny: Path, tmp_path: Path) -> None:
    """A round of ties alone has no gradient; the weights stay where they are."""
    job = online(tmp_path, tiny, min_gap=1e6, iterations=1)
    assert train.main(["--config", str(job)]) == 0
    [line] = curve(tmp_path)
    assert line["pairs"] == 0
    assert line["grad_norm"] == 0
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", tiny))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "tdpo1"}, "reads more than the log-probs of a pair"),
        ({"objective": "kto"}, "reads more than the log-probs of a pair"),
        ({"renew_reference": True, "reference_ema": 0.1}, "choose one"),
        ({"episodes": 48, "samples_per_prompt": 4, "micro_batch_size": 8}, "the 12 pairs of a round"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineDpoConfig(**fields)
