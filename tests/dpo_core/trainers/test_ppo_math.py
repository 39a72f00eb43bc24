"""PPO arithmetic against closed forms."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_core.errors import StageFailed
from dpo_core.scoring.kl import KL_ESTIMATORS, k1, k3
from dpo_core.trainers.online.ppo_math import (
    AdaptiveKL,
    KlEstimator,
    eos_penalty,
    gae,
    kl_per_token,
    last_token_index,
    masked_mean,
    masked_whiten,
    per_token_rewards,
    policy_loss,
    value_loss,
)

B, T = 5, 7


def mask_of(lengths: list[int], width: int = T) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


MASK = mask_of([7, 1, 4, 6, 3])


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def poison(values: Tensor, mask: Tensor) -> Tensor:
    """NaN in every masked position: any leak shows."""
    return torch.where(mask, values, torch.full_like(values, math.nan))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    loss(at).backward()
    assert at.grad is not None
    return at.grad


# --- means and whitening ---


def test_masked_mean() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.nan, math.nan]])
    mask = mask_of([2, 1], 3)
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask, n_tokens=6).item() == 1.5
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0


def test_whitening_gives_mean_0_and_variance_1_over_the_mask() -> None:
    white = masked_whiten(poison(5 + 3 * noise(1), MASK), MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].var(correction=0).item() == pytest.approx(1, rel=1e-7)
    assert white[~MASK].abs().sum().item() == 0.0


def test_whitening_without_shift_keeps_the_mean() -> None:
    values = 5 + 3 * noise(1)
    white = masked_whiten(values, MASK, shift_mean=False)
    assert white[MASK].mean().item() == pytest.approx(values[MASK].mean().item(), rel=1e-12)
    assert white[MASK].var(correction=0).item() == pytest.approx(1, rel=1e-7)
    assert white[~MASK].abs().sum().item() == 0.0


def test_whitening_in_float32_far_from_zero() -> None:
    values = (1e4 + noise(2)).float()
    white = masked_whiten(values, MASK)
    assert white.dtype == torch.float32
    assert white[MASK].var(correction=0).item() == pytest.approx(1, rel=1e-5)


def on_two_ranks(call: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """Run `call(rank, reduce)` on two threads whose `reduce` waits for the other and sums both tensors."""
    barrier = threading.Barrier(2, timeout=30)
    parts: list[Tensor] = [torch.empty(0)] * 2

    def work(rank: int) -> Tensor:
        def reduce(local: Tensor) -> Tensor:
            parts[rank] = local
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()  # nobody writes the next round before both have read this one
            return total

        return call(rank, reduce)

    with ThreadPoolExecutor(2) as ranks:
        return list(ranks.map(work, range(2)))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_two_ranks_whiten_as_one(shift_mean: bool) -> None:
    values = 4 + noise(3)
    rows = [slice(0, 2), slice(2, B)]
    split = on_two_ranks(
        lambda rank, reduce: masked_whiten(values[rows[rank]], MASK[rows[rank]], shift_mean, reduce)
    )
    whole = masked_whiten(values, MASK, shift_mean)
    torch.testing.assert_close(torch.cat(split), whole, rtol=1e-12, atol=1e-12)
    alone = masked_whiten(values[rows[0]], MASK[rows[0]], shift_mean)
    assert (alone - split[0]).abs().max().item() > 0.05  # the ranks truly differ


# --- KL estimators ---


def test_k1_and_k3_have_the_exact_kl_as_expectation() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    for name in ("k1", "k3"):
        estimate = (p * KL_ESTIMATORS[name](p.log(), q.log())).sum().item()
        assert estimate == pytest.approx(exact, rel=1e-12)
    biased = (p * KL_ESTIMATORS["k2"](p.log(), q.log())).sum().item()
    assert biased != pytest.approx(exact, rel=0.05)


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k2_and_k3_are_never_negative(logp: float, ref: float) -> None:
    a, b = torch.tensor(logp, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
    assert KL_ESTIMATORS["k2"](a, b).item() >= 0
    assert k3(a, b).item() >= 0
    assert k1(a, b).item() == -k1(b, a).item()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_per_token_is_zero_at_the_reference_and_where_masked(estimator: KlEstimator) -> None:
    logps = poison(noise(5), MASK)
    assert kl_per_token(logps, logps, MASK, estimator).abs().sum().item() == 0.0
    other = kl_per_token(logps, poison(noise(6), MASK), MASK, estimator)
    assert other[~MASK].abs().sum().item() == 0.0
    assert (other[MASK] != 0).all()


# --- rewards ---


def test_the_score_is_on_the_last_real_token() -> None:
    logps = noise(7)
    scores = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    rewards = per_token_rewards(logps, logps, MASK, scores, kl_coef=0.05)
    assert rewards.nonzero().tolist() == [[0, 6], [1, 0], [2, 3], [3, 5], [4, 2]]
    assert rewards.sum(dim=1).tolist() == scores.tolist()


def test_rewards_sum_to_score_minus_kl() -> None:
    logps, ref, scores = poison(noise(8), MASK), poison(noise(9), MASK), noise(10, B)
    rewards = per_token_rewards(logps, ref, MASK, scores, kl_coef=0.3)
    kl = torch.stack([(logps - ref)[b][MASK[b]].sum() for b in range(B)])
    torch.testing.assert_close(rewards.sum(dim=1), scores - 0.3 * kl)
    assert rewards[~MASK].abs().sum().item() == 0.0


def test_eos_penalty() -> None:
    scores, finished = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert eos_penalty(scores, finished, 1.5).tolist() == [2.0, 0.5]
    assert eos_penalty(scores, finished, 1.0, replace=True).tolist() == [2.0, -1.0]


@pytest.mark.parametrize("mask", [[[True, False], [False, False]], [[True, True], [False, True]]])
def test_masks_that_hide_the_last_token_are_refused(mask: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        last_token_index(torch.tensor(mask))


# --- advantages ---


def test_gae_with_lambda_1_is_monte_carlo_minus_value() -> None:
    gamma = 0.9
    rewards, values = noise(11), noise(12)
    advantages, _ = gae(rewards, values, MASK, gamma, lam=1.0)
    for b in range(B):
        length = int(MASK[b].sum())
        for t in range(length):
            rest = sum(gamma ** (k - t) * rewards[b, k].item() for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(rest - values[b, t].item(), rel=1e-10)


def test_gae_ignores_everything_behind_the_mask() -> None:
    rewards, values = noise(14), noise(15)
    clean = gae(rewards, values, MASK, 0.99, 0.95)
    dirty = gae(poison(rewards, MASK), poison(values, MASK), MASK, 0.99, 0.95)
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a[~MASK].abs().sum().item() == 0.0
    torch.testing.assert_close(clean[1], clean[0] + torch.where(MASK, values, 0.0))


# --- losses ---


def test_first_minibatch() -> None:
    logps = noise(16)
    advantages = masked_whiten(noise(17), MASK)

    def loss_of(at: Tensor) -> Tensor:
        return policy_loss(at, logps, advantages, MASK)[0]

    loss, stats = policy_loss(logps, logps, advantages, MASK)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert {name: value.item() for name, value in stats.items()} == {
        "val/ratio": 1.0,
        "val/ratio_var": 0.0,
        "policy/clipfrac_avg": 0.0,
        "policy/approxkl_avg": 0.0,
    }
    reinforce = torch.where(MASK, -advantages / MASK.sum(), 0.0)
    torch.testing.assert_close(gradient(loss_of, logps), reinforce)


def test_policy_loss_by_hand() -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    logps = torch.tensor([[1.5, 1.5, 0.5, 99.0]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    mask = mask_of([3], 4)
    loss, stats = policy_loss(logps, old, advantages, mask, clip=0.2)
    # max(-1.5, -1.2), max(1.5, 1.2), max(.5, .8)
    assert loss.item() == pytest.approx((-1.2 + 1.5 + 0.8) / 3)
    assert stats["policy/clipfrac_avg"].item() == pytest.approx(2 / 3)
    assert stats["val/ratio"].item() == pytest.approx(3.5 / 3)
    assert stats["val/ratio_var"].item() == pytest.approx(2 / 9)
    squares = 2 * math.log(1.5) ** 2 + math.log(0.5) ** 2
    assert stats["policy/approxkl_avg"].item() == pytest.approx(squares / 6)
    grad = gradient(lambda at: policy_loss(at, old, advantages, mask, clip=0.2)[0], logps)
    assert grad[0].tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0])  # only the unclipped token learns


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_policy_loss_survives_absurd_ratios(sign: float) -> None:
    logps = torch.tensor([[sign * 500.0, 0.0]])
    advantages = torch.tensor([[1.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss(logps, torch.zeros(1, 2), advantages, mask)
    grad = gradient(lambda at: policy_loss(at, torch.zeros(1, 2), advantages, mask)[0], logps)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0, 9.0]], dtype=torch.float64)
    old = torch.tensor([[0.0, 0.0, 0.9, 0.0]], dtype=torch.float64)
    returns = torch.tensor([[1.0, 3.0, 0.0, 0.0]], dtype=torch.float64)
    mask = mask_of([3], 4)
    loss, stats = value_loss(values, old, returns, mask, clip=0.2)
    # clipped values .2, .2, 1.0; errors max(0, .64), max(4, 7.84), max(1, 1)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 7.84 + 1.0) / 3)
    assert stats["val/clipfrac_avg"].item() == pytest.approx(2 / 3)


def test_losses_and_gradients_do_not_see_padding() -> None:
    wide = mask_of([7, 1, 4, 6, 3], T + 6)

    def widen(x: Tensor) -> Tensor:
        return poison(torch.cat([x, noise(99, B, 6)], dim=1), wide)

    logps, old, advantages, values, returns = (noise(30 + i) for i in range(5))
    narrow_loss = policy_loss(logps, old, advantages, MASK)[0]
    wide_loss = policy_loss(widen(logps), widen(old), widen(advantages), wide)[0]
    torch.testing.assert_close(wide_loss, narrow_loss)
    grad = gradient(lambda at: policy_loss(at, widen(old), widen(advantages), wide)[0], widen(logps))
    assert torch.isfinite(grad).all()
    assert grad[~wide].abs().sum().item() == 0.0
    torch.testing.assert_close(
        grad[:, :T], gradient(lambda at: policy_loss(at, old, advantages, MASK)[0], logps)
    )
    torch.testing.assert_close(
        value_loss(widen(values), widen(old), widen(returns), wide)[0],
        value_loss(values, old, returns, MASK)[0],
    )
    grad = gradient(lambda at: value_loss(at, widen(old), widen(returns), wide)[0], widen(values))
    assert torch.isfinite(grad).all()
    assert grad[~wide].abs().sum().item() == 0.0
    torch.testing.assert_close(
        masked_whiten(widen(advantages), wide)[:, :T], masked_whiten(advantages, MASK), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_micro_batch_losses_add_up_to_the_minibatch(loss: Callable[..., tuple[Tensor, object]]) -> None:
    one, two, three = noise(40), noise(41), noise(42)
    n = MASK.sum()
    parts = [loss(*(x[i : i + 2] for x in (one, two, three, MASK)), n_tokens=n)[0] for i in range(0, B, 2)]
    torch.testing.assert_close(torch.stack(parts).sum(), loss(one, two, three, MASK)[0])


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    gamma=st.floats(0.5, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_properties_of_random_batches(lengths: list[int], seed: int, gamma: float, lam: float) -> None:
    mask = mask_of(lengths, 6)
    shape = (len(lengths), 6)
    rewards, values, logps, old = (noise(seed + i, *shape) for i in range(4))
    advantages, returns = gae(poison(rewards, mask), poison(values, mask), mask, gamma, lam)
    torch.testing.assert_close((returns - advantages)[mask], values[mask])
    # Rows do not influence each other, and a row's own padding does not either.
    alone, _ = gae(rewards[:1, : lengths[0]], values[:1, : lengths[0]], mask[:1, : lengths[0]], gamma, lam)
    torch.testing.assert_close(advantages[:1, : lengths[0]], alone)
    # The clipped surrogate is pessimistic: never below the unclipped one.
    unclipped = masked_mean(-advantages * (logps - old).exp(), mask)
    assert policy_loss(logps, old, advantages, mask)[0].item() >= unclipped.item() - 1e-9


# --- the KL controller ---


def test_adaptive_kl() -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=1e4)
    assert controller.update(6.0, 64) == 0.15
    assert controller.update(12.0, 64) == pytest.approx(
        0.15 * 1.00128, rel=1e-12
    )  # the error is capped at 0.2
    assert AdaptiveKL(1.0).update(6.6, 1000) == pytest.approx(1.01)
    assert AdaptiveKL(1.0).update(-5.0, 1000) == pytest.approx(0.98)


def test_adaptive_kl_refuses_a_non_finite_kl() -> None:
    controller = AdaptiveKL(0.15)
    with pytest.raises(StageFailed, match="KL to the reference is nan"):
        controller.update(math.nan, 64)
    assert controller.value == 0.15


def test_the_score_may_be_one_state_later() -> None:
    """TRL's position: on the state after the last token, where the response leaves room for it."""
    mask = mask_of([2, 3], 3)
    states = mask_of([3, 3], 4)  # the second response is as long as may be
    logps, ref = noise(20, 2, 3), noise(21, 2, 3)
    scores = torch.tensor([5.0, 7.0], dtype=torch.float64)
    here = per_token_rewards(poison(logps, mask), ref, mask, scores, 0.1)
    later = per_token_rewards(poison(logps, mask), ref, mask, scores, 0.1, states_BV=states)
    assert later.shape == (2, 4)
    torch.testing.assert_close(later.sum(1), here.sum(1))
    assert later[0, 2] == 5.0
    assert here[0, 1] == later[0, 1] + 5.0
    torch.testing.assert_close(later[1, :3], here[1])
    assert later[1, 3] == 0.0
