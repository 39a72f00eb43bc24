"""Judges two sets of answers to the same prompts, and computes the win rate.

A language model is asked twice, with each answer shown first once, because judges have a position bias: of
GPT-4's verdicts on MT-bench one in eight changes with the order. Contradicting verdicts are a tie.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.judging.cache import Reply, ReplyCache, question_key
from dpo_core.judging.client import Endpoint, Judge
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.length_control import length_controlled
from dpo_core.judging.prompts import Message, Template, find_template, verdict
from dpo_core.judging.results import WinRate
from dpo_core.rewards.functions import load_reward
from dpo_core.statistics import estimates as stats

Side = Literal["a", "b"]
_SHOWN = 160  # characters of a reply that an error quotes


class Judgement(Config):
    """The judgement of one comparison."""

    score: float | None
    """1 if a wins, 0 if b wins, 0.5 for a tie; None if a verdict is not usable."""
    verdicts: list[Side | None] = Field(default_factory=list)
    """The side that a language model chose in each order, the order with `a` first leading; empty if it was
    not asked, because the answers are the same text."""
    replies: list[str] = Field(default_factory=list)
    """Its replies, or the server's reasons for refusing."""
    requests: int = 0
    """Number of replies that were requested for this comparison."""
    cached: int = 0
    """Number of replies from the cache."""
    cost: float | None = None
    """Cost of the requests; None without prices or token counts."""

    @property
    def consistent(self) -> bool | None:
        """Whether both orders gave the same side; None if one was not asked or is not usable."""
        if len(self.verdicts) < 2 or None in self.verdicts:
            return None
        return self.verdicts[0] == self.verdicts[1]


def judge_by_scores(scores_a: ArrayLike, scores_b: ArrayLike, judge: str = "a reward") -> list[Judgement]:
    """Judge by known scores: the larger one wins, equal ones are a tie.

    Args:
        judge: what the error calls the source of the scores.

    Raises:
        StageFailed: a score is not finite.
        ValueError: the numbers of scores differ.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected one score for each answer, got the shapes {a.shape} and {b.shape}")
    bad = np.flatnonzero(~(np.isfinite(a) & np.isfinite(b)))
    if len(bad):
        raise StageFailed(
            f"{judge} gave the two answers of comparison {bad[0]} the scores {a[bad[0]]} and {b[bad[0]]}, "
            "but scores must be finite numbers",
            "Check the weights of the reward model, or the reward function, that is the judge",
        )
    return [Judgement(score=float(s)) for s in (np.sign(a - b) + 1) / 2]


def judge_answers(
    config: JudgeConfig,
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Judgement]:
    """Ask a language model about every pair of answers.

    Args:
        prompts: text, or the JSON of a conversation's messages.
        cache: the folder of earlier replies; each new reply is stored there at once.
        progress: called with the numbers of answered and of all questions.

    Raises:
        StageFailed: the endpoint fails, or too many verdicts are not usable.
        RecipeError: the endpoint's key is not set.
    """
    assert config.endpoint is not None, "a judge of kind llm has an endpoint"
    template = find_template(config.template)
    comparisons: list[list[tuple[Side, str]]] = []
    questions: dict[str, list[Message]] = {}
    for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True):
        orders = []
        for first in _orders(config, prompt, a, b):
            messages = template.messages(prompt, *((a, b) if first == "a" else (b, a)))
            key = _key(config.endpoint, template, messages)
            questions[key] = messages
            orders.append((first, key))
        comparisons.append(orders)
    replies, fetched = _fetch(config, questions, sum(map(bool, comparisons)), ReplyCache(cache), progress)
    _check(config, comparisons, replies)
    judgements = []
    for orders in comparisons:
        judgements.append(_judgement(config.endpoint, orders, replies, fetched))
        fetched -= {key for _, key in orders}  # count the cost of a question of several comparisons once
    return judgements


def _orders(config: JudgeConfig, prompt: str, a: str, b: str) -> list[Side]:
    """The answer shown first, for each order; no order for equal texts, which are a tie."""
    if a.strip() == b.strip():
        return []
    if config.both_orders:
        return ["a", "b"]
    # Independent of side and row number: exchanging the models gives the same questions.
    bit = hashlib.sha256("\0".join([prompt, *sorted((a, b))]).encode(errors="replace")).digest()[0] % 2
    return ["a" if (a < b) == bool(bit) else "b"]


def _key(endpoint: Endpoint, template: Template, messages: list[Message]) -> str:
    return question_key(
        {
            "template": template.identity,
            "server": endpoint.base_url,
            "model": endpoint.model,
            "sampling": endpoint.sampling,
            "messages": messages,
        }
    )


def _fetch(
    config: JudgeConfig,
    questions: dict[str, list[Message]],
    comparisons: int,
    cache: ReplyCache,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Reply], set[str]]:
    """The reply to every question, and the keys of those that were not in the cache."""
    assert config.endpoint is not None
    replies = {key: reply for key in questions if (reply := cache.get(key))}
    missing = [key for key in questions if key not in replies]
    progress(len(replies), len(questions))
    if not missing:
        return replies, set()
    orders = 2 if config.both_orders else 1
    unusable = [reply for reply in replies.values() if verdict(reply.text) is None]
    judge = Judge(config.endpoint)
    with ThreadPoolExecutor(config.endpoint.concurrency) as pool:

        def fetch(key: str) -> Reply:
            reply = judge.ask(questions[key])
            if reply.text.strip():  # an empty reply may be transient, and costs little to repeat
                cache.put(key, reply)
            return reply

        futures = {pool.submit(fetch, key): key for key in missing}
        try:
            for future in as_completed(futures):
                reply = replies[futures[future]] = future.result()
                progress(len(replies), len(questions))
                if verdict(reply.text) is None:
                    unusable.append(reply)
                    # Stop paying: further replies cannot make up for the unusable ones.
                    if len(unusable) > config.unusable * comparisons * orders:
                        raise _broken(config, math.ceil(len(unusable) / orders), comparisons, reply)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return replies, set(missing)


def _judgement(
    endpoint: Endpoint, orders: list[tuple[Side, str]], replies: dict[str, Reply], fetched: set[str]
) -> Judgement:
    own = [replies[key] for _, key in orders]
    verdicts = [_side(first, reply) for (first, _), reply in zip(orders, own, strict=True)]
    costs = [endpoint.cost(replies[key]) for _, key in orders if key in fetched]
    return Judgement(
        # 1/2 if not asked or if the verdicts contradict each other, else the side that won.
        score=None if None in verdicts else float(np.mean([v == "a" for v in verdicts])) if verdicts else 0.5,
        verdicts=verdicts,
        replies=[reply.refused or reply.text for reply in own],
        requests=len(costs),
        cached=len(orders) - len(costs),
        cost=sum(c for c in costs if c is not None) if None not in costs and endpoint.priced else None,
    )


def _side(first: Side, reply: Reply) -> Side | None:
    letter = verdict(reply.text)
    if letter is None:
        return None
    second: Side = "b" if first == "a" else "a"
    return first if letter == "A" else second


def _check(config: JudgeConfig, comparisons: list[list[tuple[Side, str]]], replies: dict[str, Reply]) -> None:
    judged = [[replies[key] for _, key in orders] for orders in comparisons if orders]
    bad = [reply for own in judged if (reply := next((r for r in own if verdict(r.text) is None), None))]
    if len(bad) > config.unusable * len(judged):
        raise _broken(config, len(bad), len(judged), bad[0])


def _broken(config: JudgeConfig, bad: int, judged: int, example: Reply) -> StageFailed:
    text = " ".join(example.text.split())
    shown = f"answered {text[:_SHOWN]!r}{'…' if len(text) > _SHOWN else ''}" if text else "answered nothing"
    return StageFailed(
        f"the judge {config.name} gave no usable verdict in at least {bad} of {judged} comparisons "
        f"({config.unusable:.0%} are allowed); once it {example.refused or shown}",
        "Use a judge that follows the required form of replies, raise the endpoint's max_tokens if replies "
        "are cut, or raise the judge's `unusable`",
    )


@dataclass(frozen=True)
class AnswerPairs:
    """The answers of two models to the same prompts."""

    a: str
    """Name of the first model."""
    b: str
    prompts: Sequence[str]
    """Text, or the JSON of a conversation's messages."""
    answers_a: Sequence[str]
    answers_b: Sequence[str]
    chat: Sequence[bool] | None = None
    """Which prompts are conversations; only a reward model needs it."""
    clusters: Sequence[Hashable] | None = None
    """Units of resampling: the prompt of each comparison. None: the prompts' texts."""


def win_rate(judgements: Sequence[Judgement], pairs: AnswerPairs, *, judge: str, seed: int = 0) -> WinRate:
    """The win rate of judgements; those without a score are counted and left out.

    Raises:
        StageFailed: no comparison was judged, or those of a single prompt contradict each other.
    """
    names = list(pairs.prompts if pairs.clusters is None else pairs.clusters)
    scored = [i for i, j in enumerate(judgements) if j.score is not None]
    if not scored:
        raise StageFailed(
            f"none of {len(judgements)} comparisons was judged", "Compare on at least one prompt"
        )
    scores = np.asarray([judgements[i].score for i in scored], np.float64)
    clusters = [names[i] for i in scored]
    long_a = np.asarray([len(text) for text in pairs.answers_a], np.float64)
    long_b = np.asarray([len(text) for text in pairs.answers_b], np.float64)
    consistent = [j.consistent for j in judgements if j.consistent is not None]
    costs = [j.cost for j in judgements if j.verdicts]
    return WinRate(
        a=pairs.a,
        b=pairs.b,
        judge=judge,
        rate=stats.share(scores, clusters),
        wins=int((scores == 1).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores == 0).sum()),
        unjudged=len(judgements) - len(scored),
        position_consistency=float(np.mean(consistent)) if consistent else None,
        length_controlled=length_controlled(scores, long_a[scored], long_b[scored], clusters, seed=seed),
        length_a=float(long_a.mean()),
        length_b=float(long_b.mean()),
        cost=sum(c for c in costs if c is not None) if costs and None not in costs else None,
        requests=sum(j.requests for j in judgements),
        cached=sum(j.cached for j in judgements),
    )


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
