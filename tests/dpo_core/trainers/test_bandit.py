"""A bandit over short token sequences with a known reward: every method must reach the known optimum.

All answers of one or two tokens out of five are enumerated, so that the KL-regularised optimum
π* ∝ π_ref·exp(r/β) and the policy itself are exact. The tolerance is in nats of KL(π‖π*); the reference is
about one nat away. GRPO with its own k3 penalty has another optimum, which is known too.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dpo_core.generation.config import SamplingConfig
from dpo_core.methods.grpo import GrpoConfig
from dpo_core.methods.ppo import PpoConfig
from dpo_core.models.load import load_model
from dpo_core.objectives import PairLogps, Term, combine, get
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pad
from dpo_core.trainers.grpo import GrpoTrainer
from dpo_core.trainers.online.rollouts import response_logps
from dpo_core.trainers.online.sampler import RolloutContext
from dpo_core.trainers.ppo import PpoTrainer, make_critic
from dpo_core.training.config import EngineConfig, OptimConfig
from tests.support.models.tiny import make_tiny_model

VOCABULARY, PROMPT, BETA = 5, (1, 2), 0.5
ANSWERS: list[tuple[int, ...]] = list(product(range(VOCABULARY), repeat=2))
REWARDS = np.random.default_rng(5).normal(0, 0.8, len(ANSWERS))
NO_EOS = 10_000  # no token ends an answer: all have two
TOLERANCE = 0.02

ROUNDS: dict[str, Any] = {
    "iterations": 120,
    "episodes": 256,
    "micro_batch_size": 256,
    "optim": OptimConfig(learning_rate=3e-3, schedule="cosine", epsilon=1e-5, warmup_fraction=0.05),
    "engine": EngineConfig(precision="fp32", threads=1, save_every=10_000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bandit")
    make_tiny_model(path, seed=1, vocab_size=VOCABULARY, initializer_range=0.2)
    return path


Answers = list[tuple[int, ...]]


def log_policy(model: Any, answers: Answers = ANSWERS) -> NDArray[np.float64]:
    """Exact log-probs of all answers."""
    with torch.no_grad():
        _, logps_BR = response_logps(model.eval(), pad([Document(PROMPT, (a,)) for a in answers]), 1.0)
    return logps_BR.sum(1).double().numpy()


def kl(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def optimum(log_ref: NDArray[np.float64], rewards: NDArray[np.float64] = REWARDS) -> NDArray[np.float64]:
    scores = log_ref + rewards / BETA
    return np.asarray(scores - np.logaddexp.reduce(scores))


def rollout_context(work: Path, answers: Answers = ANSWERS) -> RolloutContext:
    return RolloutContext(
        prompts=[(PROMPT, "")],
        sampling=SamplingConfig(max_new_tokens=len(answers[0]), batch_size=256, precision="fp32"),
        eos_id=NO_EOS,
        scorer=lambda sequences, _: [float(REWARDS[answers.index(s.completion)]) for s in sequences],
        seed=0,
        work=work,
    )


@pytest.fixture(scope="module")
def log_ref(folder: Path) -> NDArray[np.float64]:
    return log_policy(load_model(folder))


def test_the_reference_is_far_from_the_optimum(log_ref: NDArray[np.float64]) -> None:
    """Else the tolerance would say nothing. Also (iii) of the method sheet: E[r] - β·KL of π* is β·log Z."""
    best = optimum(log_ref)
    assert kl(log_ref, best) > 20 * TOLERANCE
    worth = float(np.exp(best) @ REWARDS) - BETA * kl(best, log_ref)
    assert worth == pytest.approx(BETA * np.logaddexp.reduce(log_ref + REWARDS / BETA), abs=1e-9)


PPO: dict[str, Any] = {**ROUNDS, "epochs": 2, "kl_coef": BETA}
GRPO: dict[str, Any] = {**ROUNDS, "group_size": 8, "kl_coef": BETA}
SHORT: dict[str, Any] = {"iterations": 40, "episodes": 64, "micro_batch_size": 64}


def train(
    method: Any, folder: Path, work: Path, answers: Answers = ANSWERS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The log-probs of all answers before and after."""
    policy, reference = load_model(folder), load_model(folder)
    context = rollout_context(work, answers)
    trainer: Any
    if isinstance(method, PpoConfig):
        trainer = PpoTrainer(policy, reference, make_critic(reference), context, method)
    else:
        trainer = GrpoTrainer(policy, reference, context, method)
    trainer.train()
    return log_policy(reference, answers), log_policy(policy, answers)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(PpoConfig(**PPO | SHORT), id="ppo"),
        pytest.param(GrpoConfig(**GRPO | SHORT, variant="rloo"), id="rloo"),
    ],
)
def test_reinforcement_reaches_the_optimum_of_one_token(
    alone: None, monkeypatch: pytest.MonkeyPatch, method: Any, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    log_start, log_pi = train(method, folder, tmp_path, [(a,) for a in range(VOCABULARY)])
    best = optimum(log_start, REWARDS[:VOCABULARY])
    assert kl(log_start, best) > 20 * TOLERANCE
    assert kl(log_pi, best) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(PpoConfig(**PPO), id="ppo"),
        pytest.param(PpoConfig(**PPO, lam=1.0, whiten_advantages=False), id="ppo-plain"),
        pytest.param(PpoConfig(**PPO, score_at="after_last"), id="ppo-after-last"),
        pytest.param(GrpoConfig(**GRPO, variant="rloo"), id="rloo"),
        pytest.param(GrpoConfig(**GRPO, variant="grpo", kl_in="reward", kl_estimator="k1"), id="grpo"),
        pytest.param(GrpoConfig(**GRPO, variant="dr_grpo", kl_in="reward", kl_estimator="k1"), id="dr_grpo"),
    ],
)
def test_reinforcement_reaches_the_optimum(
    alone: None, monkeypatch: pytest.MonkeyPatch, method: Any, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    log_start, log_pi = train(method, folder, tmp_path)
    assert kl(log_pi, optimum(log_start)) < TOLERANCE


def test_dpo_reaches_the_optimum(folder: Path, log_ref: NDArray[np.float64]) -> None:
    """On every pair of answers, labelled as often as Bradley-Terry says: DPO's limit of infinite data."""
    policy = load_model(folder)
    rows = pad([Document(PROMPT, (a,)) for a in ANSWERS])
    first, second = np.triu_indices(len(ANSWERS), 1)
    chosen, rejected = np.r_[first, second], np.r_[second, first]
    share_B = torch.tensor(1 / (1 + np.exp(REWARDS[rejected] - REWARDS[chosen])))
    ref_N = torch.tensor(log_ref).float()
    term = Term("dpo", 1.0, get("dpo").resolve({"beta": BETA}))
    tokens_B = torch.full((len(chosen),), 2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for _ in range(150):
        _, logps_BR = response_logps(policy, rows, 1.0)
        logps_N = logps_BR.sum(1)
        pairs = PairLogps(
            logps_N[chosen], logps_N[rejected], ref_N[chosen], ref_N[rejected], tokens_B, tokens_B
        )
        optimizer.zero_grad()
        (combine([term], pairs) * share_B).mean().backward()
        optimizer.step()
        schedule.step()
    log_pi = log_policy(policy)
    assert kl(log_pi, optimum(log_ref)) < TOLERANCE
    # What β·log π/π_ref learnt is the reward up to one constant.
    learnt = BETA * (log_pi - log_ref) - REWARDS
    assert np.std(learnt) < 0.15


@pytest.mark.slow
def test_grpo_as_its_paper_has_it_reaches_another_optimum(
    alone: None, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """With k3 in the loss the on-policy gradient is that of KL(π_ref‖π): the optimum is π = β·π_ref/(λ - r).

    One token, so that a token's KL is the answer's; no division by the standard deviation, which has no such
    closed form.
    """
    monkeypatch.setenv("LOCAL_RANK", "0")
    answers: Answers = [(a,) for a in range(VOCABULARY)]
    rewards = REWARDS[:VOCABULARY]
    config = GrpoConfig(**ROUNDS, variant="dr_grpo", group_size=32, kl_coef=BETA)
    log_start, log_pi = train(config, folder, tmp_path, answers)
    low, high = rewards.max() + 1e-9, rewards.max() + 10.0
    for _ in range(200):  # the multiplier at which the probabilities add up to 1
        middle = (low + high) / 2
        total = float((BETA * np.exp(log_start) / (middle - rewards)).sum())
        low, high = (middle, high) if total > 1 else (low, middle)
    forward = np.log(BETA * np.exp(log_start) / (high - rewards))
    reverse = optimum(log_start, rewards)
    assert kl(log_pi, forward) < TOLERANCE / 4
    assert kl(log_pi, reverse) > 3 * kl(log_pi, forward), "the two optima can be told apart"
