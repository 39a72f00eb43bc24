"""Rewards: the built-in one, every way to name another, and every failure."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.rewards.functions import (
    CheckedReward,
    RewardFunction,
    SentimentReward,
    load_reward,
    reward_identity,
)

SENTIMENT = SentimentReward()


def write(folder: Path, code: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(code)
    return path


def test_sentiment_orders_text() -> None:
    good, bad, neutral, empty = load_reward("sentiment")(
        ["p"] * 4, ["a wonderful, moving film", "a dreadful, boring mess", "the film is long", ""]
    )
    assert bad < neutral == empty == 0.0 < good


def test_sentiment_reads_the_completion_only() -> None:
    assert SENTIMENT(["terrible awful"], ["I love it"]) == SENTIMENT(["great"], ["I love it"])


@settings(max_examples=50)
@given(st.text(max_size=80))
def test_sentiment_is_bounded_and_deterministic(text: str) -> None:
    (score,) = SENTIMENT([""], [text])
    assert -1 <= score <= 1
    assert SENTIMENT(["x", "y"], [text, text]) == [score, score]


def test_a_function_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    reward = load_reward(f"{path}:length")
    assert isinstance(reward, RewardFunction)
    assert reward.name == "length"
    assert reward(["p", "p"], ["ab", ""]) == [2.0, 0.0]


def test_a_class_in_a_file_with_its_own_name_and_a_dataclass(tmp_path: Path) -> None:
    code = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n"
        "@dataclass\n"
        "class Exclaim:\n"
        "    name: str = 'exclamation marks'\n"
        "    def __call__(self, prompts, completions):\n"
        "        return [c.count('!') for c in completions]\n"
    )
    reward = load_reward(f"{write(tmp_path, code)}:Exclaim")
    assert reward.name == "exclamation marks"
    assert reward(["p"], ["a!!"]) == [2.0]


def test_two_files_of_one_name_are_two_rewards(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, f"VALUE = {value}\ndef f(p, c):\n    return [VALUE] * len(c)\n")
    first, second = (load_reward(f"{tmp_path / folder}/mine.py:f") for folder in "ab")
    assert (first(["p"], ["c"]), second(["p"], ["c"])) == ([1.0], [2.0])


def test_a_callable_of_an_installed_module() -> None:
    reward = load_reward("dpo_core.rewards.functions:SentimentReward")
    assert reward.name == "sentiment"
    assert reward(["p"], ["I love it"]) == SENTIMENT(["p"], ["I love it"])


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("sentimental", "does not name a reward function"),
        ("", "does not name a reward function"),
        (":f", "does not name a reward function"),
        ("json:", "does not name a reward function"),
        ("no_such_package.rewards:f", "No module named 'no_such_package'"),
        ("json:no_such_name", "'json' has no 'no_such_name'"),
        ("math:pi", "is not callable: it is of type float"),
        ("nowhere/mine.py:f", "no file 'nowhere/mine.py'"),
    ],
)
def test_a_spec_that_cannot_be_loaded(spec: str, fragment: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_reward(spec)
    assert fragment in caught.value.problem
    assert "package.module:callable" in caught.value.remedy


@pytest.mark.parametrize(
    ("code", "attribute", "fragment"),
    [
        ("import no_such_thing", "f", "No module named 'no_such_thing'"),
        ("def f(:", "f", "SyntaxError"),
        ("class R:\n    def __init__(self, k): ...\n", "R", "missing 1 required positional argument"),
        ("class R: ...\n", "R", "is not callable"),
    ],
)
def test_a_broken_file(tmp_path: Path, code: str, attribute: str, fragment: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_reward(f"{write(tmp_path, code)}:{attribute}")
    assert fragment in caught.value.problem


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([1.0, math.nan, 2.0], "returned nan for row 1 (completion 'second')"),
        ([1.0, 2.0, -math.inf], "returned -inf for row 2 (completion 'third')"),
        ([None, 1.0, 2.0], "returned None for row 0"),
        ([1.0, "2.0", 3.0], "returned '2.0' for row 1"),
        (None, "TypeError"),
        (0.5, "TypeError"),
    ],
)
def test_answers_that_nobody_should_train_on(answer: Any, fragment: str) -> None:
    reward = CheckedReward(lambda prompts, completions: answer, "bad")
    with pytest.raises(StageFailed) as caught:
        reward(["p"] * 3, ["first", "second", "third"])
    assert fragment in caught.value.problem
    assert "'bad'" in caught.value.problem


def test_a_reward_that_raises_keeps_its_cause() -> None:
    def broken(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyError("lexicon")

    with pytest.raises(StageFailed, match="KeyError: 'lexicon'") as caught:
        CheckedReward(broken, "broken")(["p"], ["c"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "answer", [np.array([1, 2]), torch.tensor([1.0, 2.0]), (1, 2), [True, np.float32(2)]]
)
def test_arrays_and_tensors_become_floats(answer: Any) -> None:
    scores = CheckedReward(lambda prompts, completions: answer, "array")(["p", "p"], ["a", "b"])
    assert scores == [1.0, 2.0]
    assert all(type(score) is float for score in scores)


def test_a_reward_cannot_edit_the_callers_lists_and_is_not_asked_about_nothing() -> None:
    def greedy(prompts: list[str], completions: list[str]) -> list[float]:
        scores = [1.0] * len(completions)
        completions.clear()
        assert scores, "called without completions"
        return scores

    completions = ["a", "b"]
    assert CheckedReward(greedy, "greedy")(["p", "p"], completions) == [1.0, 1.0]
    assert completions == ["a", "b"]
    assert CheckedReward(greedy, "greedy")([], []) == []
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        CheckedReward(greedy, "greedy")(["p"], completions)


def test_an_edited_reward_is_another_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def score(prompts, completions):\n    return [1.0] * len(completions)\n")
    before = reward_identity(f"{path}:score")
    moved = tmp_path / "elsewhere.py"
    moved.write_bytes(path.read_bytes())
    assert reward_identity(f"{moved}:score") == before
    path.write_text("def score(prompts, completions):\n    return [2.0] * len(completions)\n")
    assert reward_identity(f"{path}:score") != before
    assert reward_identity("sentiment") == "sentiment"
    assert reward_identity("dpo_core.rewards.functions:SentimentReward") == reward_identity(
        "dpo_core.rewards.functions:SentimentReward"
    )
