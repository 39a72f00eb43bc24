"""Judgements by scores and by a judge on a real server: both orders, ties, invalid replies, win rate."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.judging.client import Endpoint
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import (
    AnswerPairs,
    Judgement,
    compare_answers,
    judge_answers,
    judge_by_scores,
    win_rate,
)
from dpo_core.judging.results import WinRate
from dpo_core.statistics import estimates as stats
from tests.support.sites.judge_server import Server, longer_wins, shown

PROMPTS = ["a post", "another post", "a third"]
LONG, SHORT = ["longer one", "longer two", "longer three"], ["s1", "s2", "s3"]


def rate(judgements: list[Judgement], a: list[str], b: list[str]) -> WinRate:
    return win_rate(
        judgements, AnswerPairs("ours", "theirs", [str(i) for i in range(len(a))], a, b), judge="rule"
    )


def test_a_fair_judge_is_asked_in_both_orders(server: Server) -> None:
    told: list[tuple[int, int]] = []
    judged = judge_answers(server.config(), PROMPTS, LONG, SHORT, progress=lambda *now: told.append(now))
    assert [j.score for j in judged] == [1, 1, 1]
    assert [j.verdicts for j in judged] == [["a", "a"]] * 3
    assert all(j.consistent for j in judged)
    seen = sorted(shown(asked) for asked in server.asked)
    assert seen == sorted([*zip(LONG, SHORT, strict=True), *zip(SHORT, LONG, strict=True)])
    assert all("Post" in asked["messages"][0]["content"] for asked in server.asked)
    assert told[0] == (0, 6)
    assert told[-1] == (6, 6)
    swapped = judge_answers(server.config(), PROMPTS, SHORT, LONG)
    assert [j.score for j in swapped] == [0, 0, 0]
    assert [j.verdicts for j in swapped] == [["b", "b"]] * 3


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_a_judge_who_looks_at_the_place_alone_gives_ties(server: Server, favourite: str) -> None:
    server.judge = lambda asked: f"Preferred: {favourite}"
    judged = judge_answers(server.config(), PROMPTS, LONG, SHORT)
    assert [j.score for j in judged] == [0.5, 0.5, 0.5]
    assert judged[0].verdicts == (["a", "b"] if favourite == "A" else ["b", "a"])
    result = rate(judged, LONG, SHORT)
    assert (result.wins, result.ties, result.losses, result.unjudged) == (0, 3, 0, 0)
    assert result.position_consistency == 0
    assert result.rate.value == 0.5


def test_the_numbers_of_a_mixed_comparison(server: Server) -> None:
    # Of ten: six fair, two by place, one of no verdict in one order, one of the same text.
    prompts = [f"post {i}" for i in range(10)]
    a = [f"{'w' * (9 if i < 4 else 1)} {i}" for i in range(9)] + ["same "]
    b = [f"{'w' * 5} {i}" for i in range(9)] + ["same"]

    def judge(asked: dict[str, Any]) -> str:
        first, _ = shown(asked)
        row = int(first.split()[-1])
        if row in (6, 7):
            return "Preferred: A"
        return "no idea" if row == 8 and first == a[8] else longer_wins(asked)

    server.judge = judge
    config = server.config(price_in=1.0, price_out=2.0)
    result = rate(judge_answers(config, prompts, a, b), a, b)
    assert (result.wins, result.ties, result.losses, result.unjudged) == (4, 3, 2, 1)
    assert result.rate == stats.share([1, 1, 1, 1, 0, 0, 0.5, 0.5, 0.5], list("012345679"))
    assert result.position_consistency == pytest.approx(6 / 8)
    assert (result.requests, result.cached) == (18, 0)
    assert result.cost == pytest.approx(18 * (100 * 1.0 + 10 * 2.0) / 1e6)
    assert result.length_a == np.mean([len(x) for x in a])
    assert result.length_b == np.mean([len(x) for x in b])
    assert result.length_controlled is None, "nine prompts are too few"
    assert WinRate.model_validate_json(result.model_dump_json()) == result


def test_asked_once_the_order_depends_on_the_texts_alone(server: Server) -> None:
    rows = 24
    prompts, a, b = (
        [f"p{i}" for i in range(rows)],
        [f"a{i}" for i in range(rows)],
        [f"b{i}" for i in range(rows)],
    )
    server.judge = lambda asked: "Preferred: A"
    config = server.config(both_orders=False)
    judged = judge_answers(config, prompts, a, b)
    assert len(server.asked) == rows
    wins = sum(j.score == 1 for j in judged)
    assert 4 < wins < 20, "each side leads about as often"
    assert {j.consistent for j in judged} == {None}
    assert rate(judged, a, b).position_consistency is None
    swapped = judge_answers(config, prompts, b, a)
    assert sorted(map(str, server.asked[:rows])) == sorted(map(str, server.asked[rows:]))
    assert [j.score for j in swapped] == [1 - j.score for j in judged]


def test_what_was_asked_once_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    config = server.config(price_in=1, price_out=1)
    first = rate(judge_answers(config, PROMPTS, LONG, SHORT, cache=tmp_path), LONG, SHORT)
    assert (first.requests, first.cached, first.cost) == (6, 0, pytest.approx(6 * 110e-6))
    second = rate(judge_answers(config, PROMPTS, LONG, SHORT, cache=tmp_path), LONG, SHORT)
    assert (second.requests, second.cached, second.cost) == (0, 6, 0)
    # The exchanged models are the same questions.
    judge_answers(config, PROMPTS, SHORT, LONG, cache=tmp_path)
    assert len(server.asked) == 6
    more = judge_answers(config, [*PROMPTS, "new"], [*LONG, "longer"], [*SHORT, "s"], cache=tmp_path)
    assert len(server.asked) == 8
    assert [j.requests for j in more] == [0, 0, 0, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"temperature": 0.5},
        {"max_tokens": 9},
        {"template": "summary_strict"},
        {"base_url": "+"},
    ],
)
def test_whatever_decides_a_reply_is_part_of_its_key(
    server: Server, tmp_path: Path, change: dict[str, Any]
) -> None:
    judge_answers(server.config(), PROMPTS, LONG, SHORT, cache=tmp_path)
    if change == {"base_url": "+"}:
        change = {"base_url": server.url.replace("127.0.0.1", "localhost")}
    judge_answers(server.config(**change), PROMPTS, LONG, SHORT, cache=tmp_path)
    assert len(server.asked) == 12


def test_a_question_of_several_comparisons_is_paid_once(server: Server) -> None:
    judged = judge_answers(server.config(price_in=1), ["p", "p"], ["long one"] * 2, ["s"] * 2)
    assert len(server.asked) == 2
    assert [(j.requests, j.cached) for j in judged] == [(2, 0), (0, 2)]
    assert [j.score for j in judged] == [1, 1]


def test_what_was_judged_before_a_failure_is_kept(server: Server, tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(20)]
    a, b = [f"longer {i}" for i in range(20)], [f"s{i}" for i in range(20)]
    config = server.config(concurrency=2)

    def fails_at_the_tenth(asked: dict[str, Any]) -> str:
        if len(server.asked) >= 10:
            server.always = (401, {}, b"expired")
        return longer_wins(asked)

    server.judge = fails_at_the_tenth
    with pytest.raises(StageFailed, match="answered 401: 'expired'") as caught:
        judge_answers(config, prompts, a, b, cache=tmp_path)
    assert "run again" in caught.value.remedy
    assert len(server.asked) <= 14, "the questions that waited are not asked"
    stored = sum(path.is_file() for path in tmp_path.rglob("*"))
    assert stored >= 8
    server.always, server.judge = None, longer_wins
    server.asked.clear()
    judged = judge_answers(config, prompts, a, b, cache=tmp_path)
    assert len(server.asked) == 40 - stored
    assert [j.score for j in judged] == [1.0] * 20


def test_as_many_requests_at_a_time_as_are_allowed(server: Server) -> None:
    server.delay = 0.2
    prompts = [f"p{i}" for i in range(10)]
    judge_answers(server.config(concurrency=4), prompts, ["longer"] * 10, ["s"] * 10)
    assert server.most_at_once == 4


def test_rubbish_is_not_taken_for_a_judgement(server: Server, tmp_path: Path) -> None:
    server.judge = lambda asked: "Once upon a time " * 40
    with pytest.raises(StageFailed) as caught:
        judge_answers(server.config(concurrency=1), PROMPTS, LONG, SHORT, cache=tmp_path)
    assert caught.value.problem.startswith(
        "the judge rule gave no usable verdict in at least 1 of 3 comparisons (20% "
    )
    assert "'Once upon a time Once" in caught.value.problem
    assert len(caught.value.problem) < 400
    assert "max_tokens" in caught.value.remedy
    assert len(server.asked) < 6, "what cannot be mended is not paid for"


def test_some_rubbish_is_counted(server: Server) -> None:
    rows = 10
    prompts = [f"p{i}" for i in range(rows)]
    a, b = [f"longer {i}" for i in range(rows)], [f"s {i}" for i in range(rows)]
    bad = 2

    def judge(asked: dict[str, Any]) -> str:
        first, _ = shown(asked)
        return "Preferred: A or B" if int(first.split()[-1]) < bad else longer_wins(asked)

    server.judge = judge
    result = rate(judge_answers(server.config(), prompts, a, b), a, b)
    assert (result.wins, result.unjudged) == (8, 2)
    bad = 3
    with pytest.raises(
        StageFailed, match=r"at least \d of 10 comparisons \(20% are allowed\).*'Preferred: A or B'"
    ):
        judge_answers(server.config(), prompts, a, b)
    result = rate(judge_answers(server.config(unusable=0.3), prompts, a, b), a, b)
    assert (result.wins, result.unjudged) == (7, 3)
    bad = 10
    with pytest.raises(StageFailed, match="none of 10 comparisons was judged"):
        rate(judge_answers(server.config(unusable=1), prompts, a, b), a, b)


def test_one_bad_order_of_each_is_found_at_the_end(server: Server) -> None:
    # Half of the replies: the early look, which knows replies only, may let it pass.
    server.judge = lambda asked: longer_wins(asked) if shown(asked)[0] in LONG else "?"
    with pytest.raises(StageFailed, match=r"at least 3 of 3 .*answered '\?'"):
        judge_answers(server.config(unusable=0.9), PROMPTS, LONG, SHORT)


def test_a_question_too_long_for_the_judge_costs_that_comparison_only(server: Server, tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(8)]
    a = ["longer" * 9000, *["longer"] * 7]
    server.script = [(400, {}, b"context length exceeded")]
    judged = judge_answers(server.config(concurrency=1), prompts, a, ["s"] * 8, cache=tmp_path)
    assert [j.score for j in judged] == [None, *[1.0] * 7]
    assert "context length exceeded" in judged[0].replies[0]
    # It was not kept: the next time it is asked again.
    judged = judge_answers(server.config(), prompts, a, ["s"] * 8, cache=tmp_path)
    assert [j.requests for j in judged] == [1, *[0] * 7]
    server.always = (400, {}, b"no such model")
    with pytest.raises(StageFailed, match="answered 400: 'no such model'"):
        judge_answers(server.config(), prompts, a, ["t"] * 8)


def test_silence_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.judge = lambda asked: ""
    with pytest.raises(StageFailed, match="once it answered nothing"):
        judge_answers(server.config(), PROMPTS, LONG, SHORT, cache=tmp_path)
    server.judge = longer_wins
    assert [j.score for j in judge_answers(server.config(), PROMPTS, LONG, SHORT, cache=tmp_path)] == [
        1,
        1,
        1,
    ]


def test_a_damaged_entry_is_asked_again(server: Server, tmp_path: Path) -> None:
    judge_answers(server.config(), PROMPTS, LONG, SHORT, cache=tmp_path)
    path = next(path for path in tmp_path.rglob("*.json"))
    path.write_bytes(path.read_bytes()[:-20])
    judged = judge_answers(server.config(), PROMPTS, LONG, SHORT, cache=tmp_path)
    assert len(server.asked) == 7
    assert [j.score for j in judged] == [1, 1, 1]


def test_a_model_against_itself(server: Server) -> None:
    rows = 30
    prompts, texts = [f"p{i}" for i in range(rows)], ["x" * (i + 1) for i in range(rows)]
    found = compare_answers(server.config(), AnswerPairs("m", "m", prompts, texts, texts))
    assert (found.rate.value, found.ties, found.requests) == (0.5, rows, 0)
    assert found.length_controlled is not None
    assert found.length_controlled.value == 0.5
    assert server.asked == []


def test_the_length_controlled_rate_sees_through_a_judge_of_length(server: Server) -> None:
    generator = random.Random(0)
    rows = 150
    prompts = [f"p{i}" for i in range(rows)]
    a = ["w" * generator.randint(40, 400) for _ in range(rows)]
    b = ["w" * generator.randint(20, 280) for _ in range(rows)]

    def judge(asked: dict[str, Any]) -> str:
        first, second = shown(asked)
        if (len(first) + len(second)) % 6:
            return longer_wins(asked)
        return f"Preferred: {'A' if len(first) < len(second) else 'B'}"

    server.judge = judge
    found = compare_answers(server.config(concurrency=4), AnswerPairs("ours", "theirs", prompts, a, b))
    assert found.rate.low > 0.55
    assert found.length_controlled is not None
    assert found.length_controlled.low < 0.5 < found.length_controlled.high
    assert found.length_a > found.length_b
    # One who looks at nothing else leaves no verdict between answers of equal length.
    server.judge = longer_wins
    found = compare_answers(server.config(concurrency=4), AnswerPairs("ours", "theirs", prompts, a, b))
    assert found.length_controlled is None


def test_scores_of_a_known_reward() -> None:
    judged = judge_by_scores([1.0, 2.0, 0.5], [0.5, 2.0, 1.0])
    assert [j.score for j in judged] == [1, 0.5, 0]
    with pytest.raises(StageFailed, match=r"a reward gave .* comparison 1 the scores 1\.0 and nan"):
        judge_by_scores([1, 1], [0, float("nan")])
    with pytest.raises(ValueError, match="shapes"):
        judge_by_scores([1, 2], [1])
    prompts = ["The film was", "The soup was", "The soup was"]
    good, bad = [" wonderful.", " great.", " a soup."], [" terrible.", " great.", " bad."]
    found = compare_answers(JudgeConfig(), AnswerPairs("good", "bad", prompts, good, bad))
    assert (found.judge, found.wins, found.ties, found.losses) == ("sentiment", 2, 1, 0)
    assert found.rate.n == 2, "two prompts"
    assert (found.position_consistency, found.cost, found.requests) == (None, None, 0)


def test_a_reward_model_judges_by_the_rewards_that_it_gave() -> None:
    config = JudgeConfig(kind="reward_model", source="a folder")
    pairs = AnswerPairs("ours", "theirs", ["p1", "p2"], ["a", "b"], ["c", "d"])
    found = compare_answers(config, pairs, rewards=[0.5, 1.0, 0.25, 1.0])
    assert (found.judge, found.wins, found.ties, found.losses) == ("reward model", 1, 1, 0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "llm"}, "kind is 'llm', and judge.endpoint is not set"),
        (
            {"endpoint": Endpoint(base_url="http://h/v1", model="m")},
            "kind is 'reward', and judge.endpoint is set",
        ),
        ({"template": "poem"}, "no judge prompt 'poem'"),
    ],
)
def test_a_judge_that_is_configured_by_half_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        JudgeConfig(**settings)
