"""Evaluation of policies on hand-made numbers, and of a policy that is the reference."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.errors import StageFailed
from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.evaluation.policies import kl_estimates, preference_accuracy, sample_policy, sequence_logps
from dpo_core.evaluation.summary import PolicySamples, summarise_samples
from dpo_core.generation.config import SamplingConfig
from dpo_core.models.load import load_model
from tests.support.models.logps import full_logps, random_sequences


def made(rewards: list[float], kl: list[float] | None = None) -> PolicySamples:
    """Two samples for each of two prompts, of 2, 2, 3 and 1 tokens."""
    answers = [(1, 2), (1, 2), (3, 4, 5), (6,)]
    sequences = [TokenSequence((9,), ids) for ids in answers]
    ended = [True, False, True, False]
    return PolicySamples([0, 0, 1, 1], sequences, ended, rewards, kl or [0.0] * 4, kl or [0.0] * 4, 1.25)


def test_a_row_by_hand() -> None:
    baseline = made([0.0, 0.5, 0.5, 0.0])
    row = summarise_samples(made([1.0, 0.5, 0.0, 0.25], [0.5, 0.1, 0.0, 0.2]), baseline, seed=0, length=2)
    assert row["reward"]["value"] == pytest.approx(0.4375)
    assert row["reward"]["n"] == 2, "the prompts are what is resampled"
    assert row["length"]["value"] == 2.0
    # Cut to two tokens: the bigrams (1,2), (1,2), (3,4).
    assert row["distinct_2"] == pytest.approx(2 / 3)
    assert row["ended"] == 0.5
    assert row["entropy"] == 1.25
    assert row["kl"]["value"] == row["kl_k3"]["value"] == pytest.approx(0.2)
    assert row["gain"]["value"] == pytest.approx(0.1875)
    # Won, tied, lost, won: a tie is half a win.
    assert row["win_rate"]["value"] == pytest.approx(0.625)
    # A bootstrap over two prompts whose mean gains are 0.5 and -0.125 goes from one to the other.
    assert (row["gain"]["low"], row["gain"]["high"]) == pytest.approx((-0.125, 0.5))


def test_the_reference_has_no_distance_from_itself() -> None:
    row = summarise_samples(made([1.0, 0.5, 0.0, 0.25]), None, seed=0, length=2)
    assert not {"kl", "kl_k3", "gain", "win_rate"} & set(row)


def test_other_prompts_are_refused() -> None:
    other = made([0.0] * 4)
    other.prompt_index = [0, 1, 1, 1]
    with pytest.raises(StageFailed, match="different prompts"):
        summarise_samples(made([1.0, 0.5, 0.0, 0.25]), other, seed=0, length=2)


def test_a_single_prompt_is_resampled_by_its_samples() -> None:
    samples = made([1.0, 0.5, 0.0, 0.5])
    samples.prompt_index = [0] * 4
    row = summarise_samples(samples, None, seed=0, length=2)
    assert row["reward"]["n"] == 4
    assert row["reward"]["low"] < 0.5 < row["reward"]["high"]


def test_kl_estimators_by_hand() -> None:
    ours = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    theirs = [torch.tensor([-1.5, -1.0]), torch.tensor([-0.5])]
    k1, k3 = kl_estimates(ours, theirs)
    # Log-ratios 0.5, -1 and 0.
    assert k1 == pytest.approx([-0.5, 0.0])
    assert k3 == pytest.approx([(math.exp(-0.5) - 1 + 0.5) + (math.exp(1) - 1 - 1), 0.0])
    with pytest.raises(ValueError, match="zip"):
        kl_estimates(ours, theirs[:1])


def test_preference_accuracy_by_hand() -> None:
    side = TokenSequence((1,), (2,))
    pairs = [TokenPair(str(i), side, side) for i in range(3)]
    policy = [torch.tensor(x) for x in ([-1.0, -1.0], [-3.0], [-1.0], [-1.0], [-5.0], [-5.0])]
    reference = [torch.tensor(x) for x in ([-1.5, -1.5], [-3.0], [-1.0], [-1.0], [-4.0], [-6.0])]
    # Log-ratios +1 > 0 (a win), 0 = 0 (no win: strict), -1 < 1 (a loss).
    estimate = preference_accuracy(pairs, policy, reference)
    assert estimate.value == pytest.approx(1 / 3)
    assert estimate.n == 3


def test_sequence_logps_come_in_order_whatever_the_batches(model: Any) -> None:
    sequences = random_sequences(11, 386, seed=2)
    results = sequence_logps(model, sequences, "fp32", token_budget=40)
    for sequence, logps in zip(sequences, results, strict=True):
        assert len(logps) == len(sequence.completion)
        with torch.no_grad():
            exact = full_logps(model, sequence)
        torch.testing.assert_close(logps, exact, rtol=0, atol=1e-5)


def test_a_policy_that_is_the_reference_has_kl_and_gain_of_zero(tiny: Path) -> None:
    config = EvaluateConfig(
        samples_per_prompt=2,
        sampling=SamplingConfig(max_new_tokens=6, precision="fp32", batch_size=4),
        precision="fp32",
    )
    prompts = [((5, 6, 7), "a"), ((8, 9), "b"), ((10,), "c")]

    def scorer(sequences: Any, texts: Any) -> list[float]:
        return [sum(s.completion) / 1000 + len(t) for s, t in zip(sequences, texts, strict=True)]

    drawn = []
    for model in (load_model(tiny), load_model(tiny)):
        samples = sample_policy(model, [ids for ids, _ in prompts], config, eos_id=0, seed=4)
        samples.rewards = scorer(samples.sequences, [prompts[i][1] for i in samples.prompt_index])
        drawn.append((samples, sequence_logps(model, samples.sequences, "fp32", config.token_budget)))
    (policy, ours), (reference, theirs) = drawn
    assert policy.prompt_index == [0, 0, 1, 1, 2, 2]
    assert [s.prompt for s in policy.sequences] == [prompts[i][0] for i in policy.prompt_index]
    assert len(set(policy.rewards)) > 1
    policy.kl_k1, policy.kl_k3 = kl_estimates(ours, theirs)
    assert policy.kl_k1 == policy.kl_k3 == [0.0] * 6
    row = summarise_samples(policy, reference, seed=0, length=6)
    for name in ("kl", "kl_k3", "gain"):
        assert row[name]["value"] == row[name]["low"] == row[name]["high"] == 0.0
    assert row["win_rate"]["value"] == 0.5
    pairs = [TokenPair("a", *policy.sequences[:2]), TokenPair("b", *policy.sequences[2:4])]
    assert preference_accuracy(pairs, ours[:4], theirs[:4]).value == 0.0


def test_kl_estimates_by_hand() -> None:
    policy = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0, -1.0])]
    k1, k3 = kl_estimates(policy, [torch.tensor([-2.0, -1.5]), policy[1]])
    assert k1 == pytest.approx([0.5, 0.0])
    assert k3 == pytest.approx([math.exp(-1) + math.exp(0.5) - 2 - (-1 + 0.5), 0.0])


def test_kl_estimates_are_unbiased_for_sampled_sequences() -> None:
    """Sequences of 5 independent tokens: the sequence KL is 5 times that of one token."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
    exact = 5 * (p * (p / q).log()).sum().item()
    ids = torch.multinomial(p, 5 * 20_000, replacement=True, generator=generator).reshape(20_000, 5)
    k1, k3 = map(torch.tensor, kl_estimates(list(p.log()[ids]), list(q.log()[ids])))
    for kl in (k1, k3):
        assert abs(kl.mean().item() - exact) < 4 * kl.std().item() / math.sqrt(20_000)
    assert (k1 < 0).any()
    assert (k3 >= 0).all()
    assert k3.std() < k1.std()
