"""Generates neutral openings of film, food and product reviews as prompts, for the demo without data.

A small grammar: things of eight kinds, put into the templates that suit the kind. An opening says nothing
good or bad, so that its continuation can go either way. Two openings in three are prompts; the third goes
to `demonstrations`, so that what a model is taught on is never what it is prompted with.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from dpo_core.errors import RecipeError


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


# Nouns by kind; those after the bar are plural.
NOUNS = {
    "dish": "mushroom risotto, lentil soup, lamb stew, pumpkin curry, beef burger, seafood pasta, goat "
    "cheese salad, roast chicken, tomato tart, beef noodle soup, apple pie, chocolate cake, "
    "breakfast omelette, rice bowl, cheese plate, pork belly, vegetable lasagna, onion soup "
    "| fish tacos, spring rolls, blueberry pancakes, roasted peppers, garlic noodles, lamb skewers",
    "place": "noodle bar, corner bakery, tapas place, pizzeria, coffee shop, steak house, vegan diner, sushi "
    "counter, garden café, sandwich shop, hotel restaurant, burger joint",
    "film": "spy movie, space drama, animated film, courtroom drama, heist movie, period piece, musical, "
    "detective movie, western, documentary, sequel, remake",
    "part": "first half, second half, opening scene, final act, plot, script, dialogue, camera work, "
    "soundtrack, lead performance, middle section, editing, voice-over, ending",
    "gadget": "speaker, digital watch, tablet, phone, e-reader, action camera, keyboard, activity tracker, "
    "laptop | headphones, earbuds",
    "kitchen": "frying pan, kettle, blender, coffee maker, toaster, rice cooker, stand mixer, "
    "food processor, air fryer | kitchen scales",
    "rest": "desk chair, pillow, mattress, blanket, armchair, sofa bed, rocking chair, bean bag "
    "| cushions, bed sheets",
    "wear": "rain jacket, backpack, wool sweater, winter coat, messenger bag, sun hat | running shoes, "
    "hiking boots, gloves, sneakers, jeans, sandals",
}
PRODUCTS = ("gadget", "kitchen", "rest", "wear")

# {x} = "the lentil soup", {X} = "The lentil soup", {this}/{This} go with the noun {n}; {one}: one(s).
TEMPLATES = {
    "dish": (
        "I ordered {x} and",
        "{X} at this little place",
        "For lunch I picked {x}, and",
        "My sister and I split {x}, and",
        "{X} that we had on Saturday",
        "As for {x} here,",
        "The waiter brought out {x}, and",
        "This was our first visit, and {x}",
        "{X} from the new lunch menu",
        "We drove across town for {x}, and",
    ),
    "place": (
        "We ate at {x} after work, and",
        "{X} on the corner of our street",
        "I had lunch at {x} today, and",
        "We went to {x} on Tuesday, and",
        "{X} next to the train station",
        "Last Sunday we tried {x}, and",
        "As for {x} by the river,",
        "My coworkers took me to {x}, and",
    ),
    "film": (
        "We saw {x} on Friday night, and",
        "I watched {x} with my brother, and",
        "{X} that opened last weekend",
        "As for {x} we saw,",
        "My cousin picked {x}, and",
        "At the small cinema downtown, {x}",
        "On a second viewing, {x}",
        "With a running time of two hours, {x}",
        "{X} that everyone at work mentioned",
        "I sat through {x} last night, and",
    ),
    "part": (
        "{X} of the film",
        "As for {x} of the movie,",
        "Compared with the trailer, {x}",
        "On a second viewing, {x}",
        "In the new {film}, {x}",
        "{X} of the {film}",
        "{X} of this {film}",
    ),
    "product": (
        "After {time} with {this} {n},",
        "I bought {this} {n} in March, and",
        "{This} {n} arrived on Monday and",
        "From the first day, {this} {n}",
        "For the price, {this} {n}",
        "I used {this} {n} for {time}, and",
        "Compared with my old {one}, {this} {n}",
        "I ordered {this} {n} online, and",
        "My neighbor picked out {this} {n}, and",
    ),
}
TIMES = ("two weeks", "a month", "ten days", "half a year")
VERB_NEXT_ENDINGS = (
    "arrived on Monday and",
)  # the thing itself goes on acting: "... arrived and looked ..."


@cache
def all_openings() -> tuple[Opening, ...]:
    """Every opening that the grammar gives, without repeats, in a fixed order."""
    openings: dict[str, Opening] = {}
    for kind, nouns in NOUNS.items():
        singular, _, several = nouns.partition("|")
        for plural, listed in ((False, singular), (True, several)):
            for noun in filter(None, (noun.strip() for noun in listed.split(","))):
                for text in _texts(kind, noun, plural):
                    subject_next = text.endswith((",", " and")) and not text.endswith(VERB_NEXT_ENDINGS)
                    openings.setdefault(text, Opening(text, kind, plural, subject_next))
    return tuple(openings.values())


def _texts(kind: str, noun: str, plural: bool) -> Iterator[str]:
    films = [name.strip() for name in NOUNS["film"].split(",")]
    words = {
        "x": f"the {noun}",
        "X": f"The {noun}",
        "n": noun,
        "this": "these" if plural else "this",
        "This": "These" if plural else "This",
        "one": "ones" if plural else "one",
    }
    for template in TEMPLATES["product" if kind in PRODUCTS else kind]:
        times = TIMES if "{time}" in template else TIMES[:1]
        for film, time in product(films if "{film}" in template else films[:1], times):
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
