"""What DPO leaves open and PPO does not: responses that no pair shows.

Theorem 4.1 of Xu et al., "Is DPO Superior to PPO for LLM Alignment?" (ICML 2024, arXiv 2404.10719), on their
example: one prompt, three responses, one pair y1 ≻ y2, and a reference that hardly ever writes y3. Policies
are tables of three log-probs; the losses are the project's own.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpo_core.models.reward_model import bradley_terry_loss
from dpo_core.objectives import PairLogps, get

UNSEEN = 1e-6
"""π_ref(y3); zero has no log."""
# As log-probs up to a constant. The reference itself; a start that the pair contradicts a little, and much.
STARTS = {
    "reference": (0.0, 0.0, math.log(2 * UNSEEN)),
    "uniform": (0.0, 0.0, 0.0),
    "prefers y2": (-3.0, 2.0, 0.0),
    "nearly only y2": (-6.0, 4.0, 0.0),
}


def reference(unseen: float = UNSEEN) -> Tensor:
    return torch.tensor([(1 - unseen) / 2, (1 - unseen) / 2, unseen], dtype=torch.float64).log()


def dpo_loss(logps_N3: Tensor, beta: float) -> Tensor:
    """The registered objective on the pair y1 ≻ y2 under each policy, (N,)."""
    ref_3, ones_N = reference(), torch.ones(len(logps_N3))
    chosen, rejected = (ref_3[side].expand(len(logps_N3)) for side in (0, 1))
    pair = PairLogps(logps_N3[:, 0], logps_N3[:, 1], chosen, rejected, ones_N, ones_N)
    return get("dpo").function(pair, beta=beta)


def logps_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def optimum(rewards_3: Tensor, beta: float, ref_3: Tensor) -> Tensor:
    """log π*, π* ∝ π_ref · exp(r / beta): what maximises E[r] - beta · KL(π ‖ π_ref)."""
    return torch.log_softmax(ref_3 + rewards_3 / beta, 0)


def descend(loss: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Adam on the logits from every start, each by itself; the log-probs where they end, (starts, 3)."""
    logits_N3 = torch.tensor(list(STARTS.values()), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits_N3], lr=0.05)
    for _ in range(steps):
        adam.zero_grad()
        loss(torch.log_softmax(logits_N3, -1)).sum().backward()
        adam.step()
    return torch.log_softmax(logits_N3, -1).detach()


def regularised_gain(logps_N3: Tensor, rewards_3: Tensor, beta: float, ref_3: Tensor) -> Tensor:
    """E[r] - beta · KL(π ‖ π_ref) of each policy, exactly."""
    return (logps_N3.exp() * (rewards_3 - beta * (logps_N3 - ref_3))).sum(-1)


def loss_of(logps_3: Tensor, beta: float) -> float:
    return float(dpo_loss(logps_3[None], beta))


@pytest.mark.parametrize("unseen_share", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_loss_falls_to_its_infimum_whatever_the_unseen_response_gets(unseen_share, beta):
    """log(1 + (b/a)^beta), a = π(y1), b = π(y2): y3 is in neither, and nothing is as low as b = 0."""
    a = 0.1 * (1 - unseen_share)
    for b in (1e-2, 1e-4, 1e-8):
        policy = logps_of(a, b, 1 - a - b)
        expected = math.log1p((b / a) ** beta)
        assert loss_of(policy, beta) == pytest.approx(expected, rel=1e-9)
    assert expected < 1e-3
    # The paper's policy: y2 never, y1 rarely, y3 nearly always.
    assert loss_of(logps_of(0.1, 0.0, 0.9), beta) == 0.0


def test_with_a_small_beta_the_infimum_is_far():
    assert loss_of(logps_of(0.1, 1e-9, 0.9), 0.1) == pytest.approx(0.147, abs=1e-3)


@pytest.mark.parametrize("gap", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_what_ppo_seeks_minimises_dpo_too(gap, beta):
    """At π* of a reward DPO's loss is that of the reward model: both fall to zero as the gap grows."""
    rewards_3 = torch.tensor([gap, 0.0, 3.0], dtype=torch.float64)
    policy = optimum(rewards_3, beta, reference())
    wanted = bradley_terry_loss(rewards_3[:1], rewards_3[1:2])[0]
    assert loss_of(policy, beta) == pytest.approx(float(wanted), rel=1e-9)


def test_the_papers_policy_is_no_optimum_of_any_reward():
    """π* gives y3 at most π_ref(y3) times a factor of the rewards: 0.9 of the mass would need one of 13 and
    more beyond y1's, and 0.0 of a reference that never writes it."""
    ref_3 = reference()
    needed = math.log(0.9) - float(ref_3[2]) - (math.log(0.1) - float(ref_3[0]))
    assert needed > 13
    never_3 = logps_of(0.5, 0.5, 0.0)
    for unseen_reward in (0.0, 10.0, 1000.0):
        rewards_3 = torch.tensor([1.0, 0.0, unseen_reward], dtype=torch.float64)
        assert float(optimum(rewards_3, 1.0, never_3)[2].exp()) == 0.0


def test_descent_on_dpo_moves_mass_to_the_unseen_response_from_some_starts():
    before = {name: float(torch.softmax(torch.tensor(start), 0)[2]) for name, start in STARTS.items()}
    ends = dict(zip(STARTS, descend(lambda logps_N3: dpo_loss(logps_N3, 1.0), steps=180), strict=True))
    for name, logps_3 in ends.items():
        assert loss_of(logps_3, 1.0) < 0.1, name
    after = {name: float(logps_3[2].exp()) for name, logps_3 in ends.items()}
    assert after["nearly only y2"] > 0.3 > 10 * before["nearly only y2"]
    assert after["prefers y2"] > before["prefers y2"]
    assert after["uniform"] < before["uniform"], "where y1 was likely it takes the mass"
    assert after["reference"] < 2 * UNSEEN
    # The pair's own side is no better off for it: the likely answer is one that nobody judged.
    assert float(ends["nearly only y2"][2]) > float(ends["nearly only y2"][1])


def test_ascent_on_the_regularised_reward_takes_it_away_from_every_start():
    """The reward even likes y3 as much as y1: the KL to a reference that does not know it decides."""
    beta, rewards_3 = 1.0, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    before_N = torch.softmax(torch.tensor(list(STARTS.values())), -1)[:, 2]
    left = []
    for unseen in (1e-2, 1e-4, 1e-6):
        ref_3 = reference(unseen)

        def gain(logps_N3: Tensor, ref_3: Tensor = ref_3) -> Tensor:
            return regularised_gain(logps_N3, rewards_3, beta, ref_3)

        log_pi_N3 = descend(lambda logps_N3, gain=gain: -gain(logps_N3), steps=1000)
        best = gain(optimum(rewards_3, beta, ref_3)).expand(len(STARTS))
        torch.testing.assert_close(gain(log_pi_N3), best, rtol=0, atol=3e-3)
        gap_N = log_pi_N3[:, 0] - log_pi_N3[:, 1]
        torch.testing.assert_close(gap_N, torch.full_like(gap_N, 1 / beta), rtol=0, atol=0.05)
        left.append(log_pi_N3[:, 2].exp())
    assert (left[0] > left[1]).all()
    assert (left[1] > left[2]).all()
    assert (left[2] < before_N.clamp(2 * UNSEEN, 1e-3)).all()
