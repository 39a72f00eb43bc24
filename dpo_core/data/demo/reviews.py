"""Generates openings of film, food and product reviews as prompts, and demonstrations, for the demo.

The grammar is in reviews.yaml: things of eight kinds, put into the templates that suit the kind. An opening
says nothing good or bad, so that its continuation can go either way. Two openings in three are prompts; the
third goes to the demonstrations, so that what a model is taught on is never what it is prompted with.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpo_core.errors import RecipeError

SENTIMENTS = ("positive", "negative", "mixed")


@dataclass(frozen=True)
class Opening:
    """The first words of a review."""

    text: str
    kind: str
    """Of what: dish, place, film, part (of a film), gadget, kitchen, rest (furniture, bedding) or wear."""
    plural: bool
    """The thing is "they", not "it"."""
    subject_next: bool
    """The text ends after a comma or "and", so a clause with its own subject follows; else a verb does."""


# Kinds that share the templates and second sentences of products.
_PRODUCTS = ("gadget", "kitchen", "rest", "wear")
# After it the thing itself goes on acting: "... arrived and looked ...".
_VERB_NEXT = "arrived on Monday and"


@cache
def grammar() -> dict[str, Any]:
    """The words of openings and continuations, from reviews.yaml."""
    text = Path(__file__).with_name("reviews.yaml").read_text(encoding="utf-8")
    words: dict[str, Any] = yaml.safe_load(text)
    return words


@cache
def all_openings() -> tuple[Opening, ...]:
    """Every opening that the grammar gives, without repeats, in a fixed order."""
    openings: dict[str, Opening] = {}
    for kind, nouns in grammar()["nouns"].items():
        for number, listed in nouns.items():
            for text in (text for noun in listed for text in _texts(kind, noun, number == "plural")):
                subject_next = text.endswith((",", " and")) and not text.endswith(_VERB_NEXT)
                openings.setdefault(text, Opening(text, kind, number == "plural", subject_next))
    return tuple(openings.values())


def _texts(kind: str, noun: str, plural: bool) -> Iterator[str]:
    films, times = grammar()["nouns"]["film"]["singular"], grammar()["times"]
    words = {
        "x": f"the {noun}",
        "X": f"The {noun}",
        "n": noun,
        "this": "these" if plural else "this",
        "This": "These" if plural else "This",
        "one": "ones" if plural else "one",
    }
    for template in grammar()["templates"]["product" if kind in _PRODUCTS else kind]:
        some_times = times if "{time}" in template else times[:1]
        for film, time in product(films if "{film}" in template else films[:1], some_times):
            yield template.format(**words, film=film, time=time)


def openings_for(demonstrations: bool) -> list[Opening]:
    """The grammar's share for demonstrations (one in three), or for prompts; the same with every seed."""
    return [opening for opening in all_openings() if (_place(opening.text) == 0) == demonstrations]


def _place(text: str) -> int:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % 3


def review_openings(n: int, seed: int) -> list[str]:
    """n distinct openings of 4 to 10 words, in an order drawn with the seed, the kinds in turn.

    Raises:
        RecipeError: more are asked for than the grammar has.
    """
    return [opening.text for opening in draw(openings_for(demonstrations=False), n, seed)]


def draw(openings: list[Opening], n: int, seed: int) -> list[Opening]:
    """n of the openings at random, one of each kind in turn as long as a kind has any left."""
    if not 0 < n <= len(openings):
        raise RecipeError(
            f"{n} self-made openings were asked for, and the grammar has {len(openings)}",
            f"Ask for 1 to {len(openings)}",
        )
    order = np.random.default_rng(seed).permutation(len(openings))
    turns: dict[str, int] = {}
    ranked = []
    for rank, index in enumerate(order):
        kind = openings[index].kind
        ranked.append((turns.setdefault(kind, 0), rank, openings[index]))
        turns[kind] += 1
    return [opening for _, _, opening in sorted(ranked, key=lambda entry: entry[:2])[:n]]


def _continuation(opening: Opening, sentiment: str, rng: np.random.Generator) -> str:
    """Two plain sentences' worth of text after the opening, with a space in front."""
    kind = "product" if opening.kind in _PRODUCTS else opening.kind
    predicate = _pick(grammar()["predicates"][opening.kind][sentiment], rng)
    second = _pick(grammar()["seconds"][kind][sentiment], rng)
    text = f" {'{it} ' if opening.subject_next else ''}{predicate}. {second}"
    text = re.sub(r"\[([^]]*)\]", lambda choice: _pick(choice[1].split("|"), rng), text)
    it, them, was = ("they", "them", "were") if opening.plural else ("it", "it", "was")
    return text.format(it=it, them=them, was=was)


def _pick(choices: list[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def demonstrations_with_sentiment(n: int, seed: int) -> list[tuple[str, str, str]]:
    """As `review_demonstrations`, with the intended sentiment as a third element."""
    rng = np.random.default_rng(seed)
    pool = openings_for(demonstrations=True)
    made: dict[tuple[str, str], str] = {}
    while len(made) < n:
        count = min(n - len(made), len(pool))
        for opening in draw(pool, count, int(rng.integers(2**32))):
            sentiment = SENTIMENTS[len(made) % 3]
            made.setdefault((opening.text, _continuation(opening, sentiment, rng)), sentiment)
    listed = [(opening, text, sentiment) for (opening, text), sentiment in made.items()]
    return [listed[index] for index in rng.permutation(n)]


def review_demonstrations(n: int, seed: int) -> list[tuple[str, str]]:
    """n distinct (opening, continuation) pairs, a third positive, a third negative, a third mixed.

    The openings are never among those of `review_openings`, whatever the seeds; beyond the grammar's
    number of them they repeat, with other continuations. A continuation starts with a space and has 15 to
    35 words in two sentences.
    """
    return [(opening, text) for opening, text, _ in demonstrations_with_sentiment(n, seed)]
