"""The PPO loop on a tiny model and a reward that it can learn: known first round, learning, exact resume."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from deploy.launchers import State
from dpo_core import job as train
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import NeedsNewSettings
from dpo_core.methods.job import Job
from dpo_core.methods.ppo import PpoConfig
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.reward_model import RewardModel
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pad
from dpo_core.trainers.online.rollouts import Episode, response_logps
from dpo_core.trainers.online.sampler import rollout_context
from dpo_core.trainers.ppo import make_critic, state_values
from tests.support.models.logps import full_logps, random_sequences
from tests.support.runs.online_jobs import kill_in_round, online_job
from tests.support.runs.training_jobs import build_trainer, curve, launch, timeless

ROUNDS = 10


def ppo_job(work: Path, tiny: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "iterations": ROUNDS,
        "episodes": 32,
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_size": 8,
        "kl_coef": 0.02,
        "target_kl": 3.0,
        "kl_horizon": 500.0,
        "critic_optim": {"learning_rate": 1e-2, "warmup_fraction": 0.0, "epsilon": 1e-5},
    }
    return online_job(work, tiny, "ppo", settings | changes)


@pytest.fixture(scope="module")
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of an uninterrupted run under torchrun."""
    work = tmp_path_factory.mktemp("ppo")
    assert launch(ppo_job(work, tiny)) is State.DONE
    return work


@pytest.mark.parametrize("name", ["gradient_checkpointing", "compile"])
def test_a_setting_that_ppo_does_not_read_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"engine.{name} has no effect"):
        PpoConfig(engine={name: True})


def test_the_first_round_has_known_values(straight: Path) -> None:
    first = curve(straight)[0]
    assert first["objective/kl"] == 0.0, "the policy is still the reference"
    assert first["objective/non_score_reward"] == 0.0
    assert first["objective/rlhf_reward"] == first["objective/scores"]
    assert first["objective/entropy"] > 0
    assert 1 <= first["completions/mean_length"] <= 8


def test_every_round_starts_at_a_ratio_of_exactly_one(straight: Path) -> None:
    """In fp32 the rows are scored and trained on with the same arithmetic: any other ratio is a fault."""
    lines = curve(straight)
    # The weights of the micro-batches add up to 1 but for the last bit of a double.
    assert [line["val/ratio_first"] for line in lines] == pytest.approx([1.0] * ROUNDS, abs=1e-12)
    assert any(line["val/ratio"] != 1.0 for line in lines), "later steps of a round do move"


def test_a_reward_that_can_be_learnt_is_learnt(straight: Path) -> None:
    lines = curve(straight)
    scores = [line["objective/scores"] for line in lines]
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.5
    assert lines[-1]["objective/kl"] > 0.5, "it has left the reference"
    assert lines[-1]["episode"] == ROUNDS * 32
    for line in lines:
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] - line["objective/kl_coef"] * line["objective/kl"], abs=1e-5
        )


def test_the_kl_coefficient_adapts(straight: Path) -> None:
    lines = curve(straight)
    for now, following in pairwise(lines):
        error = float(np.clip(now["objective/kl"] / 3.0 - 1, -0.2, 0.2))
        wanted = now["objective/kl_coef"] * (1 + error * 32 / 500)
        assert following["objective/kl_coef"] == pytest.approx(wanted)


def test_a_killed_run_resumes_bit_for_bit(straight: Path, tiny: Path, tmp_path: Path) -> None:
    """Policy, critic, KL controller, the prompts' position: all as in the run that nobody killed."""
    job = ppo_job(tmp_path, tiny)
    kill_in_round(job, 4)
    assert [line["step"] for line in curve(tmp_path)] == [1, 2, 3]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert launch(job) is State.DONE
    assert timeless(tmp_path) == timeless(straight)
    ours, theirs = (load_file(w / "out" / "model.safetensors") for w in (tmp_path, straight))
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name


def test_two_ranks_take_the_steps_of_one(straight: Path, tiny: Path, tmp_path: Path) -> None:
    """The same samples, advantages whitened over both ranks, the same minibatches and means over them."""
    job = ppo_job(tmp_path, tiny, iterations=2, engine={"processes": 2})
    alone = ppo_job(tmp_path / "alone", tiny, iterations=2)
    assert launch(job, processes=2) is State.DONE
    assert launch(alone) is State.DONE
    lines, wanted = curve(tmp_path), curve(alone.parent)
    assert lines[0]["objective/kl"] == 0.0
    assert [line["val/ratio_first"] for line in lines] == pytest.approx([1.0, 1.0], abs=1e-5)
    for name in (
        "objective/scores",
        "completions/mean_length",
        "loss/value_avg",
        "grad_norm",
        "critic/grad_norm",
    ):
        for ours, theirs in zip(lines, wanted, strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    for name in ("objective/kl", "loss/policy_avg", "policy/approxkl_avg"):
        assert lines[1][name] == pytest.approx(wanted[1][name], abs=1e-3), name


@pytest.mark.slow
def test_shards_of_two_ranks_resume_on_one(tiny: Path, tmp_path: Path) -> None:
    """Policy and critic under ZeRO 2, saved by two ranks, both converted for one."""
    optim = {"learning_rate": 1e-2, "schedule": "constant", "warmup_fraction": 0.0, "epsilon": 1e-5}
    both = {"optim": optim, "critic_optim": optim, "minibatches": 1}
    two = {"zero_stage": 2, "processes": 2, "save_every": 1}
    job = ppo_job(tmp_path, tiny, iterations=2, engine=two, **both)
    assert launch(job, processes=2) is State.DONE
    job = ppo_job(tmp_path, tiny, iterations=4, engine=two | {"processes": 1}, **both)
    assert launch(job) is State.DONE
    straight = ppo_job(tmp_path / "straight", tiny, iterations=4, **both)
    assert launch(straight) is State.DONE
    lines, wanted = curve(tmp_path), curve(straight.parent)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("objective/scores", "objective/kl_coef", "grad_norm", "critic/grad_norm"):
        for ours, theirs in zip(lines, wanted, strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2), (name, ours["step"])


def test_sampler_and_trainer_are_the_same_policy(straight: Path) -> None:
    """Logged for every batch; in fp32 with the same weights only the order of sums differs."""
    for line in curve(straight):
        assert 0 <= line["sampling/logp_difference/mean"] <= line["sampling/logp_difference/max"] < 1e-4
        assert line["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-4)
        assert line["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.usefixtures("real_bf16")
def test_a_bf16_sampler_is_visible_in_the_logp_difference(alone: None, tiny: Path, tmp_path: Path) -> None:
    sampling = {"max_new_tokens": 8, "batch_size": 16, "precision": "bf16"}
    job = online_job(
        tmp_path,
        tiny,
        "ppo",
        {"iterations": 1, "episodes": 32, "micro_batch_size": 32},
        sampling=sampling,
    )
    assert train.main(["--config", str(job)]) == 0
    assert curve(tmp_path)[0]["sampling/logp_difference/max"] > 1e-4


def test_the_critic_starts_from_the_reward_model(alone: None, tiny: Path, tmp_path: Path) -> None:
    """Its values on the last state are the scores, so that the first value errors are those of the states
    before; the reward model's own file is not touched."""
    model = load_model(tiny)
    reward = RewardModel(model.get_decoder(), torch.Generator().manual_seed(1))
    reward.normalise(torch.tensor([0.3, 0.9]))
    reward.save(tmp_path / "reward")
    load_tokenizer(tiny).save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "reward.json").write_text("{}")
    job = online_job(
        tmp_path / "work",
        tiny,
        "ppo",
        {"iterations": 1, "episodes": 16, "micro_batch_size": 16, "kl_coef": 0.0, "score_at": "after_last"},
        reward_source=str(tmp_path / "reward"),
        gold_source=f"{tmp_path / 'work' / 'reward.py'}:count_o",
    )
    trainer = build_trainer(job)
    sequences = [TokenSequence((5, 6), tuple(range(7, 7 + length))) for length in (1, 3, 7, 8)]
    scores = trainer.context.scorer(sequences, [""] * 4)
    episodes = [
        Episode(s, "", 0, True, (0.0,) * len(s.completion), score)
        for s, score in zip(sequences, scores, strict=True)
    ]
    [rollout] = trainer._rollouts([episodes])
    states_BV, values_BV = trainer._values(rollout)
    assert states_BV.sum(1).tolist() == [2, 4, 8, 8], "no room after the last of eight tokens"
    found_B = values_BV.gather(1, states_BV.sum(1, keepdim=True) - 1).squeeze(1)
    torch.testing.assert_close(found_B[:3], torch.tensor(scores[:3]), rtol=0, atol=1e-5)
    assert abs(float(found_B[3]) - scores[3]) > 1e-3
    assert train.main(["--config", str(job)]) == 0
    line = curve(job.parent)[0]
    assert line["objective/gold_scores"] == round(line["objective/gold_scores"] * 16) / 16
    assert line["objective/gold_scores"] != line["objective/scores"]


SHORT: dict[str, Any] = {
    "iterations": 2,
    "episodes": 16,
    "micro_batch_size": 8,
    "epochs": 1,
    "kl_coef": 0.5,
}


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run without any of the switches."""
    work = tmp_path_factory.mktemp("plain")
    assert launch(online_job(work, tiny, "ppo", dict(SHORT))) is State.DONE
    return work


@pytest.mark.parametrize(
    "changes",
    [
        {"whiten_advantages": False},
        {"whiten_rewards": True},
        {"score_clip": 0.5},
        {"missing_eos_penalty": 3.0},
        {"missing_eos_penalty": 3.0, "missing_eos": "replace"},
        {"kl_estimator": "k3", "kl_coef": 0.5},
    ],
    ids=str,
)
def test_every_switch_changes_the_course(
    alone: None, plain: Path, tiny: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """And none of them the first ratio."""
    assert train.main(["--config", str(online_job(tmp_path, tiny, "ppo", SHORT | changes))]) == 0
    ours, theirs = curve(tmp_path), curve(plain)
    assert [line["val/ratio_first"] for line in ours] == pytest.approx([1.0, 1.0], abs=1e-12)
    assert ours[0]["objective/scores"] == theirs[0]["objective/scores"], "the first samples are the same"
    assert ours[1]["grad_norm"] != theirs[1]["grad_norm"]


def test_the_reference_follows(alone: None, tiny: Path, tmp_path: Path) -> None:
    """A reference that moves all the way is the policy that sampled: the next round starts at KL 0."""
    settings = {"iterations": 3, "episodes": 16, "micro_batch_size": 8}
    for share, at_start in ((1.0, True), (0.3, False)):
        job = online_job(tmp_path / str(share), tiny, "ppo", settings | {"reference_ema": share})
        assert train.main(["--config", str(job)]) == 0
        assert all((abs(line["objective/kl"]) < 1e-6) is at_start for line in curve(job.parent)[1:])


def test_the_value_of_a_token_is_read_before_it_is_chosen(model: Any) -> None:
    """Value t must not change with response token t, only with those before it."""
    critic = make_critic(model)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        one = state_values(critic, pad([Document((5, 6), ((7, 8, 9),))]))
        other = state_values(critic, pad([Document((5, 6), ((7, 3, 9),))]))
    assert one[0, :2].equal(other[0, :2])
    assert one[0, 2] != other[0, 2]


def test_values_start_at_zero(model: Any) -> None:
    values_BR = state_values(make_critic(model), pad([Document((5, 6), ((7, 8),))]))
    assert values_BR.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_of_the_responses_at_the_temperature(model: Any, temperature: float) -> None:
    sequences = random_sequences(5, 386, seed=8)
    rows = pad([Document(s.prompt, (s.completion,)) for s in sequences])
    with torch.no_grad():
        _, logps_BR = response_logps(model, rows, temperature)
        assert logps_BR.shape == (5, max(len(s.completion) for s in sequences))
        for sequence, logps_R in zip(sequences, logps_BR, strict=True):
            wanted = full_logps(model, sequence, temperature)
            torch.testing.assert_close(logps_R[: len(wanted)], wanted, rtol=0, atol=1e-5)
            assert not logps_R[len(wanted) :].any()


def test_a_failing_reward_stops_the_run_with_its_message(alone: None, tiny: Path, tmp_path: Path) -> None:
    job = ppo_job(tmp_path, tiny)
    (tmp_path / "reward.py").write_text(
        "def count_o(prompts, completions):\n    return [float('nan')] * 32\n"
    )
    assert train.main(["--config", str(job)]) == 4
    error = json.loads((tmp_path / "error.json").read_text())
    assert "the reward 'count_o' returned nan for row 0" in error["problem"]


def test_episodes_must_divide() -> None:
    with pytest.raises(ValidationError, match=r"episodes 10 is not a multiple of .* = 8"):
        PpoConfig(episodes=10, minibatches=2, micro_batch_size=4)


def test_prompts_that_leave_no_room_are_refused(tmp_path: Path, tiny: Path) -> None:
    job = Job.model_validate(json.loads(ppo_job(tmp_path, tiny).read_text()))
    assert job.sampling
    no_room = {"max_length": job.sampling.max_new_tokens, "template": "chat"}
    tokens = job.tokens.model_copy(update=no_room)
    with pytest.raises(NeedsNewSettings, match="none of the 12 training prompts leaves room"):
        rollout_context(job, Tokenise(load_tokenizer(tiny), tokens), "fp32")
