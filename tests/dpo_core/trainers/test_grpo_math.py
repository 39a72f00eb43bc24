"""Group advantages, ratios and aggregations against closed forms (methods of GRPO, Dr. GRPO, DAPO, RLOO)."""

import math

import pytest
import torch
from torch import Tensor

from dpo_core.methods.grpo import VARIANTS, GrpoConfig
from dpo_core.trainers.online.grpo_math import (
    aggregate,
    clipped_losses,
    denominator,
    flat_groups,
    group_advantages,
    group_means,
    leave_one_out,
    log_ratios,
    soft_overlong,
)

REWARDS = torch.tensor([1.0, 0.0, 4.0, 2.0, 2.0, 2.0], dtype=torch.float64)
GROUPS = torch.tensor([7, 3, 7, 3, 7, 3])


def test_means_are_of_each_group_whatever_the_order() -> None:
    wanted = torch.tensor([7, 4, 7, 4, 7, 4]) / 3
    torch.testing.assert_close(group_means(REWARDS, GROUPS), wanted.double())


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_of_a_group_add_up_to_zero(scale: str) -> None:
    advantages = group_advantages(REWARDS, GROUPS, scale)  # type: ignore[arg-type]
    for group in (3, 7):
        assert advantages[group == GROUPS].sum().item() == pytest.approx(0, abs=1e-12)


def test_equal_rewards_have_no_advantage() -> None:
    equal, one = torch.full((4,), 0.7), torch.zeros(4)
    assert group_advantages(equal, one, "group").tolist() == [0.0] * 4
    assert leave_one_out(equal, one).tolist() == [0.0] * 4
    assert flat_groups(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])) == 1


def test_scale_by_the_batch() -> None:
    std = REWARDS.std()
    wanted = (REWARDS - group_means(REWARDS, GROUPS)) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS, GROUPS, "batch", std), wanted)


def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_1() -> None:
    torch.testing.assert_close(leave_one_out(REWARDS, GROUPS), 1.5 * (REWARDS - group_means(REWARDS, GROUPS)))
    others = [torch.cat([REWARDS[:i], REWARDS[i + 1 :]])[
        torch.cat([GROUPS[:i], GROUPS[i + 1 :]]) == GROUPS[i]].mean() for i in range(6)]  # fmt: skip
    torch.testing.assert_close(leave_one_out(REWARDS, GROUPS), REWARDS - torch.stack(others))
    pair = leave_one_out(torch.tensor([3.0, 1.0]), torch.zeros(2))
    assert pair.tolist() == [2.0, -2.0]


def test_soft_overlong_penalty() -> None:
    lengths = torch.tensor([10, 80, 90, 100, 120])
    assert soft_overlong(lengths, 100, 20).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


MASK = torch.tensor([[True, True, True], [True, False, False]])
NEW = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, math.nan, math.nan]])
OLD = torch.tensor([[-1.1, -2.2, -2.7], [-1.5, 0.0, 0.0]])


def test_the_ratio_of_tokens_of_means_and_of_sums() -> None:
    torch.testing.assert_close(
        log_ratios(NEW, OLD, MASK, "token"), torch.tensor([[0.1, 0.2, -0.3], [0.5, 0.0, 0.0]])
    )
    torch.testing.assert_close(
        log_ratios(NEW, OLD, MASK, "sum"), torch.tensor([[0.0], [0.5]]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        log_ratios(NEW, OLD, MASK, "mean"), torch.tensor([[0.0], [0.5]]), atol=1e-6, rtol=0
    )
    longer = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    halved = log_ratios(longer + 0.4, longer, torch.ones(2, 2, dtype=torch.bool), "mean")
    torch.testing.assert_close(halved, torch.full((2, 1), 0.4))


def test_clipping_from_both_sides() -> None:
    log_ratio = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses, clipped = clipped_losses(log_ratio, advantages, 0.2, 0.28)
    wanted = [-1.28, math.exp(0.5), -math.exp(-0.5), 0.8]
    assert losses.flatten().tolist() == pytest.approx(wanted)
    assert clipped.flatten().tolist() == [True, False, False, True]


def loss(values: Tensor, how: str, longest: int = 4) -> float:
    total = denominator(how, len(values), float(MASK.sum()), longest)  # type: ignore[arg-type]
    return float(aggregate(values, MASK, how) / total)  # type: ignore[arg-type]


def test_aggregations() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [5.0, math.nan, math.nan]])
    assert loss(values, "sequence") == pytest.approx((3 + 5) / 2)
    assert loss(values, "token") == pytest.approx(14 / 4)
    assert loss(values, "constant") == pytest.approx(14 / 8)


def test_only_the_constant_gives_every_token_the_same_gradient_whatever_its_response_is_long() -> None:
    """The length bias that Dr. GRPO takes away: a token of a long wrong answer counts less under GRPO."""

    def per_token(how: str) -> tuple[float, float]:
        values = torch.zeros(2, 3, requires_grad=True)
        total = denominator(how, 2, float(MASK.sum()), 4)  # type: ignore[arg-type]
        (aggregate(values, MASK, how) / total).backward()  # type: ignore[arg-type]
        assert values.grad is not None
        return float(values.grad[0, 0]), float(values.grad[1, 0])

    long, short = per_token("sequence")
    assert short == pytest.approx(3 * long)
    for how in ("token", "constant"):
        long, short = per_token(how)
        assert short == long


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not() -> None:
    logps = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]], requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    advantages = group_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2), "group")
    losses, _ = clipped_losses(log_ratios(logps, logps.detach(), mask, "token"), advantages, 0.2, 0.2)
    value = aggregate(losses, mask, "sequence") / 2
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, -advantages[:, None].float().expand(2, 2) / 4)


def test_the_variants_are_their_papers() -> None:
    grpo, dr, dapo, rloo = (VARIANTS[name] for name in ("grpo", "dr_grpo", "dapo", "rloo"))
    assert (grpo.scale, grpo.aggregate, grpo.kl_coef, grpo.kl_in, grpo.kl_estimator) == (
        "group", "sequence", 0.04, "loss", "k3",
    )  # fmt: skip
    assert (dr.scale, dr.aggregate, dr.kl_coef) == ("none", "constant", 0.0)
    assert (dapo.aggregate, dapo.clip_low, dapo.clip_high, dapo.kl_coef) == ("token", 0.2, 0.28, 0.0)
    assert dapo.dynamic_rounds > 0
    assert (rloo.baseline, rloo.level, rloo.kl_in, rloo.kl_coef) == ("leave_one_out", "sum", "reward", 0.05)


def test_a_field_changes_its_variant_and_nothing_else() -> None:
    rules = GrpoConfig(variant="dapo", clip_high=0.4).rules
    assert (rules.clip_high, rules.clip_low, rules.aggregate) == (0.4, 0.2, "token")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "rloo", "scale": "group"}, "not scaled"),
        ({"variant": "dr_grpo", "sample_std": False}, "sample_std has no effect"),
        ({"variant": "gspo", "aggregate": "token"}, "needs aggregate sequence"),
        (
            {"episodes": 60, "group_size": 8, "micro_batch_size": 4},
            "60 is not a multiple of completions",
        ),
    ],
)
def test_what_would_not_be_read_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrpoConfig(**fields)  # type: ignore[arg-type]
