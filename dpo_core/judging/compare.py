"""The win rate of one set of answers over another, whichever the judge."""

from collections.abc import Callable
from pathlib import Path

from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import RecipeError
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import AnswerPairs, judge_answers, judge_by_scores, win_rate
from dpo_core.judging.results import WinRate


def compare_answers(
    config: JudgeConfig,
    pairs: AnswerPairs,
    *,
    tokens: TokenConfig | None = None,
    cache: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> WinRate:
    """Judge answers of two models to the same prompts.

    Args:
        tokens: how a reward model is shown text.
        cache: the folder of a language model's earlier replies.

    Raises:
        StageFailed, RecipeError, ModelError: the judge cannot be used, or fails.
    """
    prompts, a, b = pairs.prompts, pairs.answers_a, pairs.answers_b
    if config.kind == "llm":
        judgements = judge_answers(config, prompts, a, b, cache=cache, progress=progress)
    else:
        chat = list(pairs.chat) if pairs.chat is not None else [False] * len(prompts)
        both = _rewards(config, [*prompts, *prompts], [*a, *b], chat * 2, tokens or TokenConfig())
        judgements = judge_by_scores(both[: len(prompts)], both[len(prompts) :])
    return win_rate(judgements, pairs, judge=config.name, seed=seed)


def _rewards(
    config: JudgeConfig, prompts: list[str], answers: list[str], chat: list[bool], tokens: TokenConfig
) -> list[float]:
    if config.kind == "reward":
        from dpo_core.rewards.functions import load_reward

        return load_reward(config.source)(prompts, answers)
    from dpo_core.data.tokens.tokenise import Tokenise
    from dpo_core.models.load import load_tokenizer
    from dpo_core.rewards.model import is_reward_model, scorer

    if not is_reward_model(config.source):
        raise RecipeError(
            f"'{config.source}' is not the folder of a trained reward model",
            "Name the folder that holds its reward.json, or set the judge's kind to reward",
        )
    tokenizer = load_tokenizer(Path(config.source))
    tokenise = Tokenise(tokenizer, tokens)
    sequences = []
    for prompt, answer, is_chat in zip(prompts, answers, chat, strict=True):
        sequences.append(tokenise.scored(prompt, is_chat, answer))
    return scorer(config.source, tokenise, "fp32")(sequences, prompts)
