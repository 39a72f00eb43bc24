"""GRPO, its variants and RLOO as jobs: known first round, exact resume, ranks, dynamic sampling.

That they learn is in test_bandit.
"""

from pathlib import Path
from typing import Any

import pytest

from deploy.launchers import State
from dpo_core import job as train
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.trainers.online.rollouts import Episode
from dpo_core.trainers.online.sampler import replaced
from tests.support.runs.online_jobs import online_job, train_in_parts
from tests.support.runs.training_jobs import build_trainer, curve, launch, timeless

SETTINGS: dict[str, Any] = {"iterations": 2, "episodes": 32, "group_size": 4, "micro_batch_size": 8}


def group_job(work: Path, tiny: Path, **changes: Any) -> Path:
    return online_job(work, tiny, "grpo", SETTINGS | changes)


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
def test_the_first_round_has_known_values(alone: None, tiny: Path, tmp_path: Path, variant: str) -> None:
    job = group_job(tmp_path, tiny, variant=variant)
    assert train.main(["--config", str(job)]) == 0
    first, second = curve(tmp_path)
    assert first["objective/kl"] == first["kl"] == 0.0
    assert first["val/ratio_first"] == second["val/ratio_first"] == 1.0
    assert first["clip_ratio/region_mean"] == 0.0
    assert second["objective/kl"] != 0.0
    assert 0 <= first["frac_reward_zero_std"] <= 1
    assert first["flops"] > 0
    assert first["sampling/logp_difference/max"] < 1e-4
    # Groups spread over micro-batches: weighted by length the surrogate is not 0, by response it is.
    if variant in ("grpo", "gspo", "rloo"):
        assert first["loss/policy_avg"] == pytest.approx(0, abs=1e-5)


def test_a_resumed_run_is_the_straight_one(alone: None, tiny: Path, tmp_path: Path) -> None:
    """With a moving reference and dynamic sampling, whose position is no function of the round."""
    changes = {"variant": "dapo", "iterations": 4, "reference_ema": 0.3, "epochs": 2, "minibatches": 2}
    straight = build_trainer(group_job(tmp_path / "straight", tiny, **changes))
    straight.train()
    resumed = train_in_parts(group_job(tmp_path / "parts", tiny, **changes), first=2)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "straight")
    ours, theirs = resumed.module.state_dict(), straight.module.state_dict()
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tiny: Path, tmp_path: Path) -> None:
    two = group_job(tmp_path / "two", tiny, variant="rloo", epochs=2, minibatches=2, engine={"processes": 2})
    one = group_job(tmp_path / "one", tiny, variant="rloo", epochs=2, minibatches=2)
    assert launch(two, processes=2) is State.DONE
    assert launch(one) is State.DONE
    for ours, theirs in zip(curve(two.parent), curve(one.parent), strict=True):
        for name in (
            "objective/scores",
            "reward",
            "reward_std",
            "grad_norm",
            "frac_reward_zero_std",
            "flops",
        ):
            # Rows of a micro-batch have other neighbours, and so another width of padding.
            assert ours[name] == pytest.approx(theirs[name], rel=0.1 if name == "flops" else 1e-3), name


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run without any of the options."""
    work = tmp_path_factory.mktemp("plain")
    assert launch(group_job(work, tiny)) is State.DONE
    return work


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_truncated": True},
        {"soft_overlong": 6},
        {"scale": "batch"},
        {"kl_in": "reward", "kl_coef": 0.5},
        {"missing_eos_penalty": 2.0, "missing_eos": "replace"},
    ],
    ids=str,
)
def test_every_option_changes_the_course(
    alone: None, plain: Path, tiny: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert train.main(["--config", str(group_job(tmp_path, tiny, **changes))]) == 0
    ours, theirs = curve(tmp_path), curve(plain)
    assert ours[1]["grad_norm"] != theirs[1]["grad_norm"]
    assert ours[0]["objective/scores"] == theirs[0]["objective/scores"]


def test_dynamic_sampling_replaces_groups_without_a_difference() -> None:
    def group(number: int, *scores: float) -> list[Episode]:
        return [Episode(TokenSequence((1,), (2,)), "", number, True, (0.0,), score) for score in scores]

    episodes = group(0, 1, 1) + group(1, 1, 0) + group(2, 3, 3)
    more = group(0, 2, 2) + group(1, 5, 4) + group(2, 0, 0)
    after = replaced(episodes, {1}, more)
    assert sorted((e.group, e.score) for e in after) == [
        (0, 4),
        (0, 5),
        (1, 0),
        (1, 1),
        (2, 3),
        (2, 3),
    ]


def test_dynamic_sampling_draws_again(alone: None, tiny: Path, tmp_path: Path) -> None:
    """The letters are rare: many groups score 0 throughout, and with redraws fewer stay so."""
    shares = []
    for rounds in (0, 3):
        job = group_job(tmp_path / str(rounds), tiny, variant="dapo", dynamic_rounds=rounds, group_size=2)
        assert train.main(["--config", str(job)]) == 0
        shares.append(curve(job.parent)[0]["frac_reward_zero_std"])
    assert shares[1] < shares[0]
