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

from deploy.launchers import LocalLauncher, State
from dpo_core import train
from dpo_core.layout import Document, pad
from dpo_core.models import load_model
from dpo_core.ppo import ActorCritic, PpoConfig
from tests.logps import full_logps, random_sequences
from tests.training_jobs import curve, launch, text, wait_until, write_job

ROUNDS = 12
PROMPTS = [{"prompt": text(i, 3), "chat": False} for i in range(12)]
# Counts a letter; a file beside it makes the reward call of that number wait to be killed.
REWARD = """
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


def count_o(prompts, completions):
    global calls
    calls += 1
    while (HERE / f"wait-{calls}").exists():
        (HERE / "waiting").touch()
        time.sleep(0.01)
    return [float(c.count("o") + c.count("e")) for c in completions]
"""


def ppo_job(work: Path, tiny: Path, **changes: Any) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    (work / "reward.py").write_text(REWARD)
    engine = {"precision": "fp32", "threads": 1, "save_every": 2} | changes.pop("engine", {})
    ppo = {
        "iterations": ROUNDS,
        "episodes": 32,
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_size": 8,
        "kl_coef": 0.02,
        "target_kl": 3.0,
        "kl_horizon": 500.0,
        "optim": {"learning_rate": 1e-2, "schedule": "linear", "warmup_fraction": 0.0, "epsilon": 1e-5},
    }
    return write_job(
        work,
        "ppo",
        tiny,
        PROMPTS,
        reference=str(tiny),
        reward_source=f"{work / 'reward.py'}:count_o",
        sampling={"max_new_tokens": 8, "batch_size": 16, "precision": "fp32"},
        ppo=ppo | changes | {"engine": engine},
    )


@pytest.fixture(scope="module")
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of an uninterrupted run under torchrun."""
    work = tmp_path_factory.mktemp("ppo")
    assert launch(ppo_job(work, tiny)) is State.DONE
    return work


@pytest.mark.parametrize("name", ["gradient_checkpointing", "compile"])
def test_a_setting_that_ppo_does_not_read_is_refused(name: str) -> None:
    from dpo_core.ppo import PpoConfig

    with pytest.raises(ValueError, match=f"engine.{name} is not read by PPO"):
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
    assert [line["val/ratio_first"] for line in lines] == [1.0] * ROUNDS
    assert any(line["val/ratio"] != 1.0 for line in lines), "later steps of a round do move"


def test_a_reward_that_can_be_learnt_is_learnt(straight: Path) -> None:
    lines = curve(straight)
    scores = [line["objective/scores"] for line in lines]
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.5
    assert np.mean(scores[-3:]) > 2 * np.mean(scores[:2])
    assert lines[-1]["objective/kl"] > 0.5, "it has left the reference"
    assert lines[-1]["episode"] == ROUNDS * 32
    for line in lines:
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] - line["objective/kl_coef"] * line["objective/kl"], abs=1e-5
        )


def test_the_kl_weight_is_steered(straight: Path) -> None:
    lines = curve(straight)
    for now, following in pairwise(lines):
        error = float(np.clip(now["objective/kl"] / 3.0 - 1, -0.2, 0.2))
        wanted = now["objective/kl_coef"] * (1 + error * 32 / 500)
        assert following["objective/kl_coef"] == pytest.approx(wanted)


TIMES = ("seconds_per_step", "time")


def timeless(work: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in curve(work)]


def test_a_killed_run_goes_on_bit_for_bit(straight: Path, tiny: Path, tmp_path: Path) -> None:
    job = ppo_job(tmp_path, tiny)
    # A round is four reward calls; the fourth round is killed in its second.
    hold = tmp_path / "wait-14"
    hold.touch()
    launcher = LocalLauncher()
    handle = launcher.submit(job, 1, tmp_path)
    wait_until((tmp_path / "waiting").exists, "the fourteenth reward")
    launcher.cancel(handle, grace=0)
    assert [line["step"] for line in curve(tmp_path)] == [1, 2, 3]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    hold.unlink()
    assert launch(job) is State.DONE
    assert timeless(tmp_path) == timeless(straight)
    ours, theirs = (load_file(w / "out" / "model.safetensors") for w in (tmp_path, straight))
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name


def test_two_ranks_share_the_episodes(tiny: Path, tmp_path: Path) -> None:
    job = ppo_job(tmp_path, tiny, iterations=2, engine={"processes": 2})
    assert launch(job, processes=2) is State.DONE
    lines = curve(tmp_path)
    assert lines[0]["objective/kl"] == 0.0
    assert [line["val/ratio_first"] for line in lines] == [1.0, 1.0]
    assert lines[-1]["episode"] == 64


def test_the_value_of_a_token_is_read_before_it_is_chosen(model: Any) -> None:
    """Value t must not change with response token t, only with those before it."""
    critic = ActorCritic(model)
    with torch.no_grad():
        critic.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        _, one = critic(pad([Document((5, 6), ((7, 8, 9),))]), 1.0)
        _, other = critic(pad([Document((5, 6), ((7, 3, 9),))]), 1.0)
    assert one[0, :2].equal(other[0, :2])
    assert one[0, 2] != other[0, 2]


def test_values_start_at_zero(model: Any) -> None:
    _, values_BR = ActorCritic(model)(pad([Document((5, 6), ((7, 8),))]), 1.0)
    assert values_BR.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_of_the_responses_at_the_temperature(model: Any, temperature: float) -> None:
    sequences = random_sequences(5, 386, seed=8)
    rows = pad([Document(s.prompt, (s.completion,)) for s in sequences])
    with torch.no_grad():
        logps_BR, values_BR = ActorCritic(model)(rows, temperature)
        assert logps_BR.shape == values_BR.shape == (5, max(len(s.completion) for s in sequences))
        for sequence, logps_R in zip(sequences, logps_BR, strict=True):
            wanted = full_logps(model, sequence, temperature)
            torch.testing.assert_close(logps_R[: len(wanted)], wanted, rtol=0, atol=1e-5)
            assert not logps_R[len(wanted) :].any()


def test_a_reward_that_fails_stops_the_run_with_its_words(alone: None, tiny: Path, tmp_path: Path) -> None:
    job = ppo_job(tmp_path, tiny)
    (tmp_path / "reward.py").write_text("def count_o(prompts, completions):\n    return [float('nan')] * 8\n")
    assert train.main(["--config", str(job)]) == 4
    error = json.loads((tmp_path / "error.json").read_text())
    assert "the reward 'count_o' returned nan for row 0" in error["problem"]


def test_no_prompts_are_told(alone: None, tiny: Path, tmp_path: Path) -> None:
    from dpo_core.errors import StageFailed
    from dpo_core.generate import SamplingConfig
    from dpo_core.ppo import PpoTrainer

    model = load_model(tiny)
    with pytest.raises(StageFailed, match="no prompts"):
        PpoTrainer(
            model,
            model,
            [],
            PpoConfig(),
            SamplingConfig(),
            scorer=lambda sequences, prompts: [],
            eos_id=0,
            seed=0,
            work=tmp_path,
        )


def test_episodes_must_divide() -> None:
    with pytest.raises(ValidationError, match=r"episodes 10 is not a multiple of .* = 8"):
        PpoConfig(episodes=10, minibatches=2, micro_batch_size=4)
