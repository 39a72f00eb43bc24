"""Verdicts on every claim, from studies constructed on each side of it."""

import pytest

from dpo_core.study import Claim, Point, claims, summarise
from tests.dpo_core.study.test_summary import CURVE, LOWER
from tests.support.reports.studies import noisy, point, study

SEEDS = (0, 1, 2)


def judged(points: list[Point], words: str, **changes: object) -> Claim:
    made = study(points, **changes)
    (claim,) = (claim for claim in claims(made, summarise(made)) if words in claim.claim)
    return claim


def policy(name: str, rewards: list[float], *, kl: float = 4.0, **changes: object) -> list[Point]:
    """One setting, one seed for each reward."""
    return [
        point(name, "beta=0.1", seed, kl=kl, reward=reward, **changes)  # type: ignore[arg-type]
        for seed, reward in enumerate(rewards)
    ]


# ------------------------------------------------------------------------------------------- dominance


@pytest.mark.parametrize("rival", ["PPO", "PPO-GT"])
@pytest.mark.parametrize(
    ("dpo", "ppo", "verdict"),
    [
        ([0.8, 0.9, 1.0], [0.4, 0.5, 0.6], "supported"),
        ([0.4, 0.5, 0.6], [0.8, 0.9, 1.0], "contradicted"),
        ([0.4, 0.8, 0.9], [0.8, 0.5, 0.7], "undecided"),
        ([0.8, 0.9, 1.0], [0.8, 0.9, 1.0], "undecided"),
        ([0.8, 0.9], [0.4, 0.5], "undecided"),
        ([0.9], [0.4], "undecided"),
    ],
)
def test_dominance(rival: str, dpo: list[float], ppo: list[float], verdict: str) -> None:
    claim = judged([*policy("DPO", dpo), *policy(rival, ppo)], f"dominates {rival}'s")
    assert claim.verdict == verdict
    assert ("fewer than the 3" in claim.found) == (len(dpo) < 3)
    assert "at 1 nats" in claim.found


def test_less_at_one_fixed_kl_contradicts_dominance() -> None:
    early = [point("PPO", "beta=1", seed, kl=0.5, reward=0.9) for seed in SEEDS]
    claim = judged([*policy("DPO", [2.0, 2.0, 2.0]), *early, *policy("PPO", [0.9] * 3)], "dominates PPO's")
    # DPO has more area (its envelope is the higher one from KL 1.8 on), yet less at 1 nat.
    assert "mean gain up to 4 nats +0.156" in claim.found
    assert claim.verdict == "contradicted"


def test_dominance_is_judged_where_both_policies_are() -> None:
    """A policy that was not pushed as far says nothing of what it would do there."""
    short = policy("DPO", [0.5] * 3, kl=1.5)
    claim = judged([*short, *policy("PPO", [0.6] * 3)], "dominates PPO's")
    assert claim.verdict == "supported"
    assert "up to the 1.5 that both reach" in claim.found
    assert "at 4 nats" not in claim.found
    nearer = policy("DPO", [0.5] * 3, kl=0.7)
    claim = judged([*nearer, *policy("PPO", [0.6] * 3)], "dominates PPO's")
    assert claim.verdict == "undecided"
    assert "no fixed KL that both reach" in claim.found
    still = policy("DPO", [0.5] * 3, kl=-0.1)
    assert judged([*still, *policy("PPO", [0.6] * 3)], "dominates PPO's").verdict == "undecided"


def test_random_studies_are_judged_as_they_were_made() -> None:
    def verdicts(dpo: dict, ppo: dict) -> list[str]:
        made = [noisy({"DPO": dpo, "PPO": ppo}, data_seed=seed) for seed in range(20)]
        return [claims(one, summarise(one))[0].verdict for one in made]

    assert verdicts(CURVE, LOWER).count("supported") >= 15
    assert verdicts(LOWER, CURVE).count("contradicted") >= 18
    assert verdicts(CURVE, CURVE).count("undecided") >= 17


# --------------------------------------------------------------------------------------------- compute


@pytest.mark.parametrize(
    ("dpo", "ppo", "verdict"),
    [
        ([1e12, 1e12, 1e12], [4e12, 4e12, 4e12], "supported"),
        ([1e12, 1e12, 1e12], [3e12, 3e12, 3e12], "supported"),
        ([1e12, 1e12, 1e12], [2e12, 2e12, 2e12], "contradicted"),
        ([1e12, 1e12, 1e12], [2e12, 3e12, 6e12], "undecided"),
        ([1e12, 1e12], [4e12, 4e12], "undecided"),
    ],
)
def test_compute(dpo: list[float], ppo: list[float], verdict: str) -> None:
    points = [
        point(name, "beta=0.1", seed, flops=flops)
        for name, costs in (("DPO", dpo), ("PPO", ppo))
        for seed, flops in enumerate(costs)
    ]
    assert judged(points, "compute").verdict == verdict


def test_compute_that_is_seldom_defined_decides_nothing() -> None:
    ppo = policy("PPO", [0.9, -0.5, -0.1], flops=9e12)
    claim = judged([*policy("DPO", [0.5] * 3), *ppo], "compute")
    assert claim.verdict == "undecided"
    assert "defined in 5" in claim.found
    nothing = judged([*policy("DPO", [0.5] * 3), *policy("PPO", [-0.1] * 3)], "compute")
    assert (nothing.verdict, nothing.found) == (
        "undecided", "DPO and PPO share no gain at which to compare",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- diversity


@pytest.mark.parametrize("name", ["TDPO1", "TDPO2", "f-DPO"])
@pytest.mark.parametrize(
    ("entropies", "verdict"),
    [
        ([2.8, 2.76, 3.0], "supported"),
        ([2.7, 2.5, 2.0], "contradicted"),
        ([2.8, 2.7, 3.0], "undecided"),
        ([2.8, 2.8], "undecided"),
    ],
)
def test_entropy(name: str, entropies: list[float], verdict: str) -> None:
    ours = [point(name, "beta=0.1", seed, entropy=value) for seed, value in enumerate(entropies)]
    claim = judged([*policy("DPO", [0.5] * 3), *ours], f"{name} has more entropy")
    assert claim.verdict == verdict
    assert claim.claimed == "+37% at the same β"
    assert f"over {len(entropies)} seeds" in claim.found


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.51, 0.6, 0.7], "supported"),
        ([0.49, 0.4, 0.3], "contradicted"),
        ([0.5, 0.5, 0.5], "undecided"),
        ([0.4, 0.6, 0.7], "undecided"),
    ],
)
def test_distinct_n(values: list[float], verdict: str) -> None:
    ours = [
        point("TDPO1", "beta=0.1", seed, distinct_1=value - 0.3, distinct_2=value)
        for seed, value in enumerate(values)
    ]
    for metric in ("distinct-1", "distinct-2"):
        claim = judged([*policy("DPO", [0.5] * 3), *ours], metric)
        assert claim.verdict == verdict
        assert claim.claimed == "more at the same β"


def test_diversity_must_agree_at_every_beta() -> None:
    dpo = [point("DPO", f"beta={beta}", seed) for beta in (0.1, 1) for seed in SEEDS]
    ours = [
        point("TDPO1", f"beta={beta}", seed, entropy=entropy)
        for beta, entropy in ((0.1, 3.0), (1, 2.2))
        for seed in SEEDS
    ]
    claim = judged([*dpo, *ours], "TDPO1 has more entropy")
    assert claim.verdict == "undecided"
    assert claim.found == (
        "beta=0.1 +50.0% [+50.0% to +50.0%]; beta=1 +10.0% [+10.0% to +10.0%]; ranges over 3 seeds"
    )


# ----------------------------------------------------------------------------------------- few samples


@pytest.mark.parametrize(
    ("pre", "plain", "verdict"),
    [
        ([1.2, 1.3, 1.4], [1.0, 1.0, 1.0], "supported"),
        ([1.1, 1.05, 1.0], [1.0, 1.0, 1.0], "contradicted"),
        ([0.9, 1.2, 1.4], [1.0, 1.0, 1.0], "undecided"),
        ([1.4, 1.4], [1.0, 1.0], "undecided"),
        ([1.2, 1.3, 1.4], [0.9, -0.5, -0.1], "undecided"),
        ([1.2, 1.3, 1.4], [-0.1, -0.1, -0.1], "undecided"),
    ],
)
def test_few_samples(pre: list[float], plain: list[float], verdict: str) -> None:
    claim = judged([*policy("Pre-DPO, few", pre), *policy("DPO, few", plain)], "few samples")
    assert claim.verdict == verdict
    assert claim.claimed == "+15%"


# ------------------------------------------------------------------------------------------- what lacks


def test_claims_are_stated_where_their_policies_are() -> None:
    for points in ([], policy("A", [0.5]) + policy("B", [0.4]), policy("DPO", [0.5])):
        made = study(points)
        assert claims(made, summarise(made)) == []
    made = study([*policy("DPO", [0.5]), *policy("PPO", [0.4])])
    assert [claim.claim for claim in claims(made, summarise(made))] == [
        "DPO's reward-KL frontier dominates PPO's", "DPO needs a third of RLHF's compute for the same reward",
    ]  # fmt: skip
    # Compute is compared with the first policy's.
    made = study([*policy("PPO", [0.4]), *policy("DPO", [0.5])])
    assert [claim.claim for claim in claims(made, summarise(made))] == [
        "DPO's reward-KL frontier dominates PPO's"
    ]


def test_policies_that_share_no_setting_are_named() -> None:
    claim = judged([*policy("DPO", [0.5]), point("TDPO1", "beta=7", 0)], "TDPO1 has more entropy")
    assert (claim.found, claim.verdict) == ("TDPO1 and DPO share no setting", "not measured")
