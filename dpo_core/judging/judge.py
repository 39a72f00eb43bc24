"""Two sets of answers to the same prompts before a judge, and the win rate that follows.

A language model is asked twice, each answer shown first once, because judges favour a place: on GPT-4's
verdicts of MT-bench one in eight changes with the order. Verdicts that contradict each other are a tie.
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
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.judging.cache import Reply, ReplyCache, question_key
from dpo_core.judging.client import Endpoint, Judge
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.length_control import length_controlled
from dpo_core.judging.prompts import Message, Template, find_template, verdict
from dpo_core.judging.results import WinRate
from dpo_core.statistics import estimates as stats

Side = Literal["a", "b"]
_SHOWN = 160  # characters of a reply that an error quotes


class Judgement(Config):
    """One comparison."""

    score: float | None
    """1 a wins, 0 b wins, 0.5 a tie; None where a verdict could not be used."""
    verdicts: list[Side | None] = Field(default_factory=list)
    """Of a language model, the side that it chose in each order asked, the one that shows `a` first leading;
    empty where it was not asked: the answers are the same text."""
    replies: list[str] = Field(default_factory=list)
    """What it wrote, or why the server refused."""
    requests: int = 0
    """Replies that were fetched for this comparison."""
    cached: int = 0
    """Replies that were there already."""
    cost: float | None = None
    """Of what was fetched; None without prices or token counts."""

    @property
    def consistent(self) -> bool | None:
        """Whether both orders gave the same side; None where one was not asked or cannot be used."""
        if len(self.verdicts) < 2 or None in self.verdicts:
            return None
        return self.verdicts[0] == self.verdicts[1]


def judge_by_scores(scores_a: ArrayLike, scores_b: ArrayLike) -> list[Judgement]:
    """The comparisons by known scores, larger better, equal a tie.

    Raises:
        StageFailed: a score is not finite.
        ValueError: the numbers of scores differ.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"scores of shapes {a.shape} and {b.shape}")
    bad = np.flatnonzero(~(np.isfinite(a) & np.isfinite(b)))
    if len(bad):
        raise StageFailed(
            f"comparison {bad[0]} has the scores {a[bad[0]]} and {b[bad[0]]}",
            "A judge's scores must be finite numbers",
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
        cache: the folder of earlier replies; each new one is kept there as it comes, whatever follows.
        progress: told how many of how many questions are answered.

    Raises:
        StageFailed: the endpoint fails, or too many verdicts cannot be used.
        RecipeError: no endpoint is configured, or its key is not set.
        ValueError: the numbers of prompts and answers differ.
    """
    if config.endpoint is None:
        raise RecipeError("no language model is configured as a judge", "Set the judge's endpoint")
    template = find_template(config.template)
    comparisons: list[list[tuple[Side, str]]] = []
    questions: dict[str, list[Message]] = {}
    for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True):
        asked = []
        for first in _orders(config, prompt, a, b):
            messages = template.messages(prompt, *((a, b) if first == "a" else (b, a)))
            key = _key(config.endpoint, template, messages)
            questions[key] = messages
            asked.append((first, key))
        comparisons.append(asked)
    found, fetched = _ask(config, questions, sum(map(bool, comparisons)), ReplyCache(cache), progress)
    _check(config, comparisons, found)
    judgements = []
    for asked in comparisons:
        judgements.append(_judgement(config.endpoint, asked, found, fetched))
        fetched -= {key for _, key in asked}  # a question that several comparisons share was paid once
    return judgements


def _orders(config: JudgeConfig, prompt: str, a: str, b: str) -> list[Side]:
    """Which answer is shown first, order by order; nothing to ask where both are one text: that is a tie."""
    if a.strip() == b.strip():
        return []
    if config.both_orders:
        return ["a", "b"]
    # Neither which side it is nor where the row stands takes part: exchanged models are asked the same.
    drawn = hashlib.sha256("\0".join([prompt, *sorted((a, b))]).encode(errors="replace")).digest()[0] % 2
    return ["a" if (a < b) == bool(drawn) else "b"]


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


def _ask(
    config: JudgeConfig,
    questions: dict[str, list[Message]],
    comparisons: int,
    cache: ReplyCache,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Reply], set[str]]:
    """The reply to every question, and which of them were fetched now."""
    assert config.endpoint is not None
    found = {key: reply for key in questions if (reply := cache.get(key))}
    missing = [key for key in questions if key not in found]
    progress(len(found), len(questions))
    if not missing:
        return found, set()
    orders = 2 if config.both_orders else 1
    unusable = [reply for reply in found.values() if verdict(reply.text) is None]
    with Judge(config.endpoint) as judge, ThreadPoolExecutor(config.endpoint.concurrency) as pool:

        def fetch(key: str) -> Reply:
            reply = judge.ask(questions[key])
            if reply.text.strip():  # silence may pass, and costs little to meet again
                cache.put(key, reply)
            return reply

        futures = {pool.submit(fetch, key): key for key in missing}
        try:
            for future in as_completed(futures):
                reply = found[futures[future]] = future.result()
                progress(len(found), len(questions))
                if verdict(reply.text) is None:
                    unusable.append(reply)
                    # Each spoils half a comparison or more: what comes cannot mend it and would be paid.
                    if len(unusable) > config.unusable * comparisons * orders:
                        raise _broken(config, math.ceil(len(unusable) / orders), comparisons, reply)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found, set(missing)


def _judgement(
    endpoint: Endpoint, asked: list[tuple[Side, str]], found: dict[str, Reply], fetched: set[str]
) -> Judgement:
    replies = [found[key] for _, key in asked]
    verdicts = [_side(first, reply) for (first, _), reply in zip(asked, replies, strict=True)]
    costs = [endpoint.cost(found[key]) for _, key in asked if key in fetched]
    return Judgement(
        # Nobody asked, or contradicting verdicts: 1/2. One side throughout: its win.
        score=None if None in verdicts else float(np.mean([v == "a" for v in verdicts])) if verdicts else 0.5,
        verdicts=verdicts,
        replies=[reply.refused or reply.text for reply in replies],
        requests=len(costs),
        cached=len(asked) - len(costs),
        cost=sum(c for c in costs if c is not None) if None not in costs and endpoint.priced else None,
    )


def _side(first: Side, reply: Reply) -> Side | None:
    letter = verdict(reply.text)
    if letter is None:
        return None
    second: Side = "b" if first == "a" else "a"
    return first if letter == "A" else second


def _check(config: JudgeConfig, comparisons: list[list[tuple[Side, str]]], found: dict[str, Reply]) -> None:
    asked = [[found[key] for _, key in one] for one in comparisons if one]
    bad = [reply for one in asked if (reply := next((r for r in one if verdict(r.text) is None), None))]
    if len(bad) > config.unusable * len(asked):
        raise _broken(config, len(bad), len(asked), bad[0])


def _broken(config: JudgeConfig, bad: int, asked: int, example: Reply) -> StageFailed:
    said = " ".join(example.text.split())
    shown = f"answered {said[:_SHOWN]!r}{'…' if len(said) > _SHOWN else ''}" if said else "answered nothing"
    return StageFailed(
        f"the judge {config.name} gave no usable verdict in at least {bad} of {asked} comparisons "
        f"({config.unusable:.0%} are allowed); once it {example.refused or shown}",
        "Take a judge that keeps to the form it is asked for, raise the endpoint's max_tokens where replies "
        "end early, or allow more with the judge's `unusable`",
    )


@dataclass(frozen=True)
class AnswerPairs:
    """The answers of two models to the same prompts, side by side."""

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
    """What is resampled together: the prompt of each comparison; None: the prompts' texts."""


def win_rate(judgements: Sequence[Judgement], pairs: AnswerPairs, *, judge: str, seed: int = 0) -> WinRate:
    """What the judgements come to; those without a score are counted and left out.

    Raises:
        StageFailed: no comparison was judged, or those of a single prompt contradict each other.
    """
    names = list(pairs.prompts if pairs.clusters is None else pairs.clusters)
    kept = [i for i, one in enumerate(judgements) if one.score is not None]
    if not kept:
        raise StageFailed(
            f"none of {len(judgements)} comparisons was judged", "Compare on at least one prompt"
        )
    scores = np.asarray([judgements[i].score for i in kept], np.float64)
    kept_names = [names[i] for i in kept]
    long_a = np.asarray([len(text) for text in pairs.answers_a], np.float64)
    long_b = np.asarray([len(text) for text in pairs.answers_b], np.float64)
    orders = [one.consistent for one in judgements if one.consistent is not None]
    costs = [one.cost for one in judgements if one.verdicts]
    return WinRate(
        a=pairs.a,
        b=pairs.b,
        judge=judge,
        rate=stats.share(scores, kept_names),
        wins=int((scores == 1).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores == 0).sum()),
        unjudged=len(judgements) - len(kept),
        position_consistency=float(np.mean(orders)) if orders else None,
        length_controlled=length_controlled(scores, long_a[kept], long_b[kept], kept_names, seed=seed),
        length_a=float(long_a.mean()),
        length_b=float(long_b.mean()),
        cost=sum(c for c in costs if c is not None) if costs and None not in costs else None,
        requests=sum(one.requests for one in judgements),
        cached=sum(one.cached for one in judgements),
    )
