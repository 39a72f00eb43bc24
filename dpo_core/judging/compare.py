"""Compares the answers of two models with any kind of judge."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import AnswerPairs, judge_answers, judge_by_scores, win_rate
from dpo_core.judging.results import WinRate
from dpo_core.rewards.functions import load_reward


def compare_answers(
    config: JudgeConfig,
    pairs: AnswerPairs,
    *,
    rewards: Sequence[float] | None = None,
    cache: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> WinRate:
    """Judge answers of two models to the same prompts.

    Args:
        rewards: of the first model's answers, then of the second's; required if the judge is a reward model.
        cache: the folder of a language model's earlier replies.

    Raises:
        StageFailed, RecipeError: the judge cannot be used, or fails.
    """
    prompts, a, b = pairs.prompts, pairs.answers_a, pairs.answers_b
    if config.kind == "llm":
        judgements = judge_answers(config, prompts, a, b, cache=cache, progress=progress)
    else:
        if rewards is None:
            rewards = load_reward(config.source)([*prompts, *prompts], [*a, *b])
        judgements = judge_by_scores(rewards[: len(prompts)], rewards[len(prompts) :], config.name)
    return win_rate(judgements, pairs, judge=config.name, seed=seed)
