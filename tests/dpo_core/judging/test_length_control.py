"""Length-controlled win rate: simulated judges with known bias, and an independent fit."""

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_core.judging.length_control import fit, length_controlled, scaled
from dpo_core.statistics import estimates as stats
from dpo_core.statistics.estimates import Floats


def sigmoid(x: Floats) -> Floats:
    value: Floats = 1 / (1 + np.exp(-x))
    return value


def lengths(n: int, ratio: float, seed: int = 0) -> tuple[Floats, Floats]:
    """Characters of n answers of both sides; those of a are `ratio` times as long in the middle."""
    generator = np.random.default_rng(seed)
    return (
        np.round(generator.lognormal(np.log(300 * ratio), 0.5, n)),
        np.round(generator.lognormal(np.log(300), 0.5, n)),
    )


def judged(longer: Floats, quality: float, taste: float, seed: int = 1) -> Floats:
    """0/1 verdicts of a judge with p = σ(quality + taste·tanh(Δlen/std))."""
    p = sigmoid(quality + taste * np.tanh(longer / longer.std(ddof=1)))
    scores: Floats = (np.random.default_rng(seed).random(len(p)) < p).astype(float)
    return scores


def test_a_judge_who_likes_length_alone_is_seen_through() -> None:
    a, b = lengths(800, 2.0)
    scores = judged(a - b, quality=0.0, taste=2.5)
    raw, controlled = stats.share(scores), length_controlled(scores, a, b)
    assert controlled is not None
    assert raw.low > 0.7
    assert controlled.low < 0.5 < controlled.high
    assert abs(controlled.value - 0.5) < 0.05
    assert controlled.high - controlled.low < 0.15


def test_quality_remains_when_the_taste_for_length_is_taken_out() -> None:
    # σ(0.85) = 0.70 at equal lengths; the answers are shorter, and their raw rate hides it.
    a, b = lengths(1500, 0.6)
    scores = judged(a - b, quality=0.85, taste=2.0)
    raw, controlled = stats.share(scores), length_controlled(scores, a, b)
    assert controlled is not None
    assert raw.value < 0.56
    assert controlled.low < 0.70 < controlled.high
    assert controlled.low > raw.high


def test_a_judge_without_taste_for_length_leaves_the_rate_as_it_is() -> None:
    a, b = lengths(1000, 2.0)
    scores = judged(a - b, quality=0.6, taste=0.0)
    controlled = length_controlled(scores, a, b)
    assert controlled is not None
    assert controlled.low < sigmoid(np.array(0.6)) < controlled.high
    assert abs(controlled.value - scores.mean()) < 0.04


def test_a_model_against_itself_is_one_half() -> None:
    a, _ = lengths(50, 1.0)
    controlled = length_controlled(np.full(50, 0.5), a, a)
    assert controlled is not None
    assert controlled.value == 0.5
    assert controlled.low < 0.5 < controlled.high
    # The same of sampled answers, whose lengths differ and whose verdicts go either way.
    first, second = lengths(1000, 1.0, seed=7)
    both = np.concatenate([first - second, second - first])
    verdicts = judged(first - second, 0.0, 1.0)
    exact = length_controlled(np.concatenate([verdicts, 1 - verdicts]), both, np.zeros(2000), resamples=20)
    assert exact is not None
    assert exact.value == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_exchanging_the_two_gives_one_minus_the_rate(seed: int) -> None:
    a, b = lengths(120, 1.5, seed)
    scores = judged(a - b, 0.4, 1.0, seed)
    scores[::5] = 0.5
    clusters = [i // 2 for i in range(120)]
    ours = length_controlled(scores, a, b, clusters, resamples=50)
    theirs = length_controlled(1 - scores, b, a, clusters, resamples=50)
    assert ours is not None
    assert theirs is not None
    assert ours.n == 60
    assert ours.value == pytest.approx(1 - theirs.value, abs=1e-6)
    assert ours.low == pytest.approx(1 - theirs.high, abs=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_without_penalty_it_is_the_ordinary_logistic_fit(soft: bool) -> None:
    sm = pytest.importorskip("statsmodels.api")
    a, b = lengths(300, 1.4, 3)
    scores, weights = judged(a - b, 0.5, 1.2), np.ones(300)
    if soft:
        scores[:60], weights[100:150] = 0.5, 3.0
    x = scaled(a - b, weights[None])
    expected = sm.GLM(
        scores, np.column_stack([np.ones(300), x[0]]), family=sm.families.Binomial(), freq_weights=weights
    ).fit()
    (theta,), (phi,) = fit(scores, x, weights[None])
    assert (theta, phi) == pytest.approx(expected.params, abs=1e-4)


def test_the_scale_is_the_standard_deviation_of_the_repeated_rows() -> None:
    longer, times = np.array([-3.0, 1.0, 8.0]), np.array([2.0, 1.0, 4.0])
    spread = np.repeat(longer, times.astype(int)).std(ddof=1)
    assert scaled(longer, times[None])[0] == pytest.approx(np.tanh(longer / spread))


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_verdict_that_never_varies_is_not_explained_by_length(score: float) -> None:
    a, b = lengths(40, 3.0)
    assert length_controlled(np.full(40, score), a, b) == stats.share(np.full(40, score))


def test_one_dissenting_verdict_points_the_same_way_as_the_rest() -> None:
    # Resamples without the one dissent hold a single class.
    a, b = lengths(40, 1.0)
    for most in (0.0, 1.0):
        scores = np.full(40, most)
        scores[3] = 1 - most
        controlled = length_controlled(scores, a, b, resamples=100)
        assert controlled is not None
        assert abs(controlled.value - most) < 0.15
        assert abs((controlled.high if most else controlled.low) - most) < 0.05


def test_where_length_cannot_be_told_from_quality_there_is_no_rate() -> None:
    a, b = lengths(24, 1.0)
    assert length_controlled(judged(a - b, 0, 1), a, b) is None, "too few prompts"
    verdicts = np.arange(40) % 3 / 2
    assert length_controlled(verdicts, np.full(40, 30), np.full(40, 20)) is None, "one difference throughout"
    same = length_controlled(verdicts, np.full(40, 20), np.full(40, 20), resamples=50)
    assert same is not None
    assert same.value == pytest.approx(verdicts.mean(), abs=0.03)


def test_the_interval_resamples_prompts() -> None:
    # Ten judgements of each prompt that agree with each other carry what one does.
    a, b = lengths(60, 1.2, 5)
    scores = judged(a - b, 0.3, 1.0, 5)
    once = length_controlled(scores, a, b, resamples=200)
    copies = [np.tile(x, 10) for x in (scores, a, b)]
    tenfold = length_controlled(*copies, clusters=list(range(60)) * 10, resamples=200)
    assert once is not None
    assert tenfold is not None
    assert tenfold.n == 60
    assert 0.6 < (tenfold.high - tenfold.low) / (once.high - once.low) < 1.7


def test_on_verdicts_of_people(shared: Path) -> None:
    """PandaLM's test set: three annotators on answers of ten pairs of 7B models."""
    sm = pytest.importorskip("statsmodels.api")
    path = shared / "data" / "preference" / "pandalm_human_testset.json.gz"
    if not path.is_file():
        pytest.skip(f"PandaLM's human verdicts are not at {path}")
    pairs: dict[str, list[tuple[float, int, int]]] = {}
    for row in json.loads(gzip.decompress(path.read_bytes())):
        votes = [row[f"annotator{i}"] for i in (1, 2, 3)]
        score = 1.0 if votes.count(1) > 1 else 0.0 if votes.count(2) > 1 else 0.5
        lengths = len(str(row["response1"])), len(str(row["response2"]))
        pairs.setdefault(row["cmp_key"], []).append((score, *lengths))
    assert len(pairs) == 10
    for rows in pairs.values():
        scores, a, b = np.asarray(rows, float).T
        estimate = length_controlled(scores, a, b, resamples=2)
        (x,) = scaled(a - b, np.ones((1, len(a))))
        model = sm.GLM(scores, np.column_stack([np.ones_like(x), x]), family=sm.families.Binomial())
        theta, phi = model.fit().params
        assert estimate is not None
        assert phi > 1, "people, too, prefer the longer answer"
        assert estimate.value == pytest.approx(sigmoid(theta), abs=1e-4)


NIGHTLY = [pytest.param(200, 0.5, marks=pytest.mark.slow), pytest.param(60, 1.5, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("prompts", "quality"), [(30, 0.0), (60, 0.5), *NIGHTLY])
def test_it_covers_what_it_should(prompts: int, quality: float) -> None:
    """Also on few prompts with a weak effect, where a penalty chosen once claimed one half for certain."""
    results = []
    for seed in range(120):
        a, b = lengths(prompts, 1.5, 100 + seed)
        results.append(length_controlled(judged(a - b, quality, 1.0, seed), a, b, resamples=150, seed=seed))
    estimates = [estimate for estimate in results if estimate is not None]
    assert len(estimates) > 110
    assert all(estimate.low < estimate.value < estimate.high for estimate in estimates)
    covered = np.mean([estimate.low <= sigmoid(np.array(quality)) <= estimate.high for estimate in estimates])
    assert covered >= 0.89


def test_lengths_that_say_every_verdict_leave_no_rate() -> None:
    a, b = lengths(60, 1.2, 3)
    longer = a - b
    scores = (longer > 40).astype(float)
    assert length_controlled(scores, a, b) is None
    assert length_controlled(1 - scores, a, b) is None
    scores[np.abs(longer - 40).argmin()] = 0.5
    assert length_controlled(scores, a, b) is None, "a tie at the border parts them still"
    # A single verdict against the length that most resamples lack.
    scores[longer.argmax()] = 0.0
    assert length_controlled(scores, a, b) is None
    rest = np.random.default_rng(0).permutation(60)[:15]
    scores[rest] = 1 - scores[rest]
    assert length_controlled(scores, a, b) is not None


@pytest.mark.bench
def test_seconds_of_a_full_comparison() -> None:
    a, b = lengths(805, 1.3)
    scores = judged(a - b, 0.2, 1.0)
    start = time.perf_counter()
    estimate = length_controlled(scores, a, b)
    print(f"805 comparisons, 400 resamples: {estimate}, {time.perf_counter() - start:.1f} s")
