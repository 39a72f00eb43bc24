"""Prompts of the world of scenes, with their records, and scenes that fulfil them.

Two domains: `comp` has the categories and wording of T2I-CompBench (Huang et al. 2023, arXiv 2307.06350),
`gen` the tags and wording of GenEval. The training scenes stand for pictures from the web: in a share of
them the caption is wrong.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from dpo_core.images.records import Record, Relation, Thing, Wanted, requirements
from dpo_core.images.scenes import CELL, COLORS, PLACES, SHAPES, SIZE, TEXTURES, box_at

Domain = Literal["comp", "gen"]
NUMBERS = ("one", "two", "three", "four")
_COLORED = 3
"""Captions of training scenes come from each category that names colours this many times as often as from the
others: otherwise a small model learns these words last."""
_COMP_RELATIONS: dict[Relation, str] = {
    "left of": "on the left of",
    "right of": "on the right of",
    "above": "on the top of",
    "below": "on the bottom of",
}


@dataclass(frozen=True)
class Content:
    """What prompts may speak of. Content that is held out is missing here."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    colors: tuple[str, ...] = tuple(COLORS)
    textures: tuple[str, ...] = tuple(TEXTURES)
    counts: tuple[int, ...] = (2, 3, 4)


ALL = Content()
HELD_OUT = Content(
    tuple(s for s in SHAPES if s != "ring"),
    tuple(c for c in COLORS if c != "purple"),
    ALL.textures,
    (2, 3),
)
"""Everything but rings, purple and four of a kind: a study trains on it and measures on the rest as well."""


def _color(rng: random.Random, content: Content) -> Record:
    first, second = rng.sample(content.shapes, 2)
    one, two = rng.sample(content.colors, 2)
    include = (_wanted(first, color=one), _wanted(second, color=two))
    return Record(tag="color", include=include, prompt=f"a {one} {first} and a {two} {second}")


def _shape(rng: random.Random, content: Content) -> Record:
    names = rng.sample(content.shapes, 3)
    prompt = f"a {names[0]} , a {names[1]} and a {names[2]}"
    return Record(tag="shape", include=tuple(_wanted(name) for name in names), prompt=prompt)


def _texture(rng: random.Random, content: Content) -> Record:
    first, second = rng.sample(content.shapes, 2)
    one, two = rng.sample(content.textures, 2)
    include = (_wanted(first, texture=one), _wanted(second, texture=two))
    return Record(tag="texture", include=include, prompt=f"a {one} {first} and a {two} {second}")


def _spatial(rng: random.Random, content: Content) -> Record:
    first, second = rng.sample(content.shapes, 2)
    relation = rng.choice(list(_COMP_RELATIONS))
    include = (_wanted(second), _wanted(first, position=(relation, 0)))
    prompt = f"a {first} {_COMP_RELATIONS[relation]} a {second}"
    return Record(tag="spatial", include=include, prompt=prompt)


def _numeracy(rng: random.Random, content: Content) -> Record:
    first, second = rng.sample(content.shapes, 2)
    count = rng.choice(content.counts)
    limit = (_wanted(first, count=count + 1),)
    if count < 4 and rng.random() < 0.5:
        both = (_wanted(first, count=count), _wanted(second))
        prompt = f"{NUMBERS[count - 1]} {plural(first)} and one {second}"
        return Record(tag="numeracy", include=both, exclude=limit, prompt=prompt)
    prompt = f"{NUMBERS[count - 1]} {plural(first)}"
    return Record(tag="numeracy", include=(_wanted(first, count=count),), exclude=limit, prompt=prompt)


def _complex(rng: random.Random, content: Content) -> Record:
    first, second = rng.sample(content.shapes, 2)
    one, two = rng.sample(content.colors, 2)
    texture = rng.choice(content.textures)
    relation = rng.choice(list(_COMP_RELATIONS))
    include = (_wanted(second, color=two), _wanted(first, color=one, texture=texture, position=(relation, 0)))
    prompt = f"a {texture} {one} {first} {_COMP_RELATIONS[relation]} a {two} {second}"
    return Record(tag="complex", include=include, prompt=prompt)


def _single_object(rng: random.Random, content: Content) -> Record:
    name = rng.choice(content.shapes)
    return Record(tag="single_object", include=(_wanted(name),), prompt=f"a photo of a {name}")


def _two_object(rng: random.Random, content: Content) -> Record:
    first, second = rng.sample(content.shapes, 2)
    include = (_wanted(first), _wanted(second))
    return Record(tag="two_object", include=include, prompt=f"a photo of a {first} and a {second}")


def _counting(rng: random.Random, content: Content) -> Record:
    name, count = rng.choice(content.shapes), rng.choice(content.counts)
    return Record(
        tag="counting",
        include=(_wanted(name, count=count),),
        exclude=(_wanted(name, count=count + 1),),
        prompt=f"a photo of {NUMBERS[count - 1]} {plural(name)}",
    )


def _colors(rng: random.Random, content: Content) -> Record:
    name, color = rng.choice(content.shapes), rng.choice(content.colors)
    return Record(tag="colors", include=(_wanted(name, color=color),), prompt=f"a photo of a {color} {name}")


def _position(rng: random.Random, content: Content) -> Record:
    first, second = rng.sample(content.shapes, 2)
    relation = rng.choice(list(_COMP_RELATIONS))
    include = (_wanted(second), _wanted(first, position=(relation, 0)))
    prompt = f"a photo of a {first} {relation} a {second}"
    return Record(tag="position", include=include, prompt=prompt)


def _color_attr(rng: random.Random, content: Content) -> Record:
    record = _color(rng, content)
    return record.model_copy(update={"tag": "color_attr", "prompt": f"a photo of {record.prompt}"})


TAGS: dict[Domain, dict[str, Callable[[random.Random, Content], Record]]] = {
    "comp": {
        "color": _color,
        "shape": _shape,
        "texture": _texture,
        "spatial": _spatial,
        "numeracy": _numeracy,
        "complex": _complex,
    },
    "gen": {
        "single_object": _single_object,
        "two_object": _two_object,
        "counting": _counting,
        "colors": _colors,
        "position": _position,
        "color_attr": _color_attr,
    },
}
"""The categories of each domain, and what makes a prompt of it."""


def plural(name: str) -> str:
    """More than one of a shape."""
    return f"{name}es" if name == "cross" else f"{name}s"


def words() -> list[str]:
    """Every word of every prompt, sorted."""
    sentences = ["a photo of and , one", *NUMBERS, *_COMP_RELATIONS, *_COMP_RELATIONS.values()]
    sentences += [*SHAPES, *map(plural, SHAPES), *COLORS, *TEXTURES]
    return sorted({word for sentence in sentences for word in sentence.split()})


def records(domain: Domain, per_tag: int, seed: int, content: Content = ALL) -> list[Record]:
    """Different prompts of a domain, `per_tag` of each category or as many as there are.

    They are drawn in one order for each seed: more of them begin with the same ones.
    """
    made: list[Record] = []
    for tag, make in TAGS[domain].items():
        rng = random.Random(f"{seed} {domain} {tag}")
        known: dict[str, Record] = {}
        misses = 0
        while len(known) < per_tag and misses < 1000:
            record = make(rng, content)
            misses = misses + 1 if record.prompt in known else 0
            known.setdefault(record.prompt, record)
        made += known.values()
    return made


PROMPT_FILES: dict[Domain, Path] = {
    domain: Path(__file__).parent / f"{domain}_prompts.jsonl" for domain in TAGS
}
"""The prompts that the suites ask for, in the form of GenEval's metadata."""


def within(record: Record, content: Content) -> bool:
    """Whether a prompt speaks only of this content."""
    return all(
        w.name in content.shapes
        and (w.color is None or w.color in content.colors)
        and (w.texture is None or w.texture in content.textures)
        and (w.count == 1 or w.count in content.counts)
        for w in record.include
    )


def captioned_scenes(count: int, seed: int, wrong: float) -> Iterator[tuple[Record, list[Thing]]]:
    """Scenes of both domains with captions, of which the share `wrong` tells something else than is shown."""
    rng = random.Random(f"{seed} scenes")
    makers = [
        make
        for domain in TAGS.values()
        for tag, make in domain.items()
        for _ in range(_COLORED if tag in ("color", "complex", "colors", "color_attr") else 1)
    ]
    for _ in range(count):
        record = rng.choice(makers)(rng, ALL)
        shown = _other_content(record, rng) if rng.random() < wrong else record
        yield record, scene(shown, rng)


def scene(record: Record, rng: random.Random) -> list[Thing]:
    """Objects that fulfil a record; what it leaves open is random."""
    while True:
        wanted = [w for w in record.include for _ in range(w.count)]
        places = _places(len(wanted), rng)
        things = [
            Thing(
                w.name,
                w.color or rng.choice(list(COLORS)),
                w.texture or rng.choice(list(TEXTURES)),
                box_at(*place),
            )
            for w, place in zip(wanted, places, strict=True)
        ]
        if all(requirement.holds for requirement in requirements(record, things)):
            return things


def _other_content(record: Record, rng: random.Random) -> Record:
    """A record as a careless caption would leave it: swapped attributes, another count, the other side."""
    include = list(record.include)
    if record.exclude:
        counts = [n for n in range(1, 5 - (len(include) - 1)) if n != include[0].count]
        count = rng.choice(counts)
        include[0] = include[0].model_copy(update={"count": count})
        limit = record.exclude[0].model_copy(update={"count": count + 1})
        return record.model_copy(update={"include": tuple(include), "exclude": (limit,)})
    if include[-1].position:
        relation, index = include[-1].position
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        include[-1] = include[-1].model_copy(update={"position": (opposite[relation], index)})
    elif len(include) == 2 and (include[0].color or include[0].texture):
        first, second = include
        include = [_dressed(first, second), _dressed(second, first)]
    elif include[0].color:
        color = rng.choice([c for c in COLORS if c != include[0].color])
        include[0] = include[0].model_copy(update={"color": color})
    else:
        names = [w.name for w in include]
        name = rng.choice([s for s in SHAPES if s not in names])
        include[0] = include[0].model_copy(update={"name": name})
    return record.model_copy(update={"include": tuple(include)})


def _dressed(wanted: Wanted, other: Wanted) -> Wanted:
    return wanted.model_copy(update={"color": other.color, "texture": other.texture})


def _places(count: int, rng: random.Random) -> Sequence[tuple[int, int]]:
    """Corners of objects with a cell between each two."""
    while True:
        chosen: list[tuple[int, int]] = []
        free: Sequence[tuple[int, int]] = PLACES
        while free and len(chosen) < count:
            chosen.append(rng.choice(free))
            far = _far_from()[chosen[-1]]
            free = [place for place in free if place in far]
        if len(chosen) == count:
            return chosen


@cache
def _far_from() -> dict[tuple[int, int], frozenset[tuple[int, int]]]:
    """For each corner of an object the corners that leave a cell between it and another object."""
    apart = SIZE + CELL
    return {
        (a, b): frozenset((x, y) for x, y in PLACES if abs(x - a) >= apart or abs(y - b) >= apart)
        for a, b in PLACES
    }


def _wanted(
    name: str,
    count: int = 1,
    color: str | None = None,
    texture: str | None = None,
    position: tuple[Relation, int] | None = None,
) -> Wanted:
    return Wanted.model_validate(
        {"class": name, "count": count, "color": color, "texture": texture, "position": position}
    )
