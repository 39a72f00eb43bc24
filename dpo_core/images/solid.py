"""The part of the world of scenes that a small diffusion model learns in minutes, and its graded score.

Objects of four shapes and four colours, all solid: one in the middle of an image, or two side by side. Its
prompts are those of GenEval's tags without counts and places.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpo_core.images.prompts import TAGS, Content, records
from dpo_core.images.records import Record, Thing
from dpo_core.images.scenes import STRICT, Pixels, best_fits, box_at, draw, kinds
from dpo_core.system import digest_text

CONTENT = Content(
    shapes=("square", "circle", "cross", "triangle"),
    colors=("red", "green", "blue", "yellow"),
    textures=("solid",),
)
PROMPT_FILE = Path(__file__).parent / "solid_prompts.jsonl"
"""The held-out prompts, which the suite `scenes_solid` asks for, in the form of GenEval's metadata."""
_MIDDLE, _SIDES = (4, 4), ((0, 4), (8, 4))
"""Upper left corners. If a single object could stand in several places, guidance would often draw two: at
high noise its share in each place is small, and guidance makes it larger."""
SOLID_TAGS = ("single_object", "two_object", "colors", "color_attr")
_CAPTIONED = (*SOLID_TAGS, "color_attr", "color_attr")
"""Which object has which colour is learned last, so captions of it come three times as often."""


def words() -> list[str]:
    """Every word of every prompt, sorted."""
    return sorted({"a", "photo", "of", "and", *CONTENT.shapes, *CONTENT.colors})


def captioned(count: int, seed: int, wrong: float) -> Iterator[tuple[str, Pixels]]:
    """Captions with images, of which the share `wrong` shows what another caption of the tag says."""
    rng = random.Random(f"{seed} solid scenes")
    for _ in range(count):
        make = TAGS["gen"][rng.choice(_CAPTIONED)]
        record = make(rng, CONTENT)
        shown = make(rng, CONTENT) if rng.random() < wrong else record
        yield record.prompt, draw(solid_scene(shown, rng))


def solid_scene(record: Record, rng: random.Random) -> list[Thing]:
    """Solid objects that fulfil a record; what it leaves open is random."""
    places = rng.sample(_SIDES, 2) if len(record.include) == 2 else [_MIDDLE]
    return [
        Thing(w.name, w.color or rng.choice(CONTENT.colors), "solid", box_at(*place))
        for w, place in zip(record.include, places, strict=True)
    ]


def prompts(held_out: bool) -> list[Record]:
    """The prompts to make pairs of, a third of each tag, or the others, to measure on."""
    every = records("gen", 1000, 0, CONTENT)
    chosen = []
    for tag in SOLID_TAGS:
        own = sorted((r for r in every if r.tag == tag), key=lambda r: digest_text(r.prompt))
        third = -(-len(own) // 3)
        chosen += own[third:] if held_out else own[:third]
    return chosen


def graded(asked: Sequence[Record], images_N: Pixels) -> list[float]:
    """How well each image shows what its record asks for, from 0 to 1: the mean fit of the wanted objects.

    Unlike the detector it tells a bad image from a worse one, and it does not see what else is there.
    Fits with which an object counts are all 1: such objects look alike, and noise would rank them.
    """
    fit_NK = best_fits(images_N)
    found = []
    for record, fit_K in zip(asked, fit_NK, strict=True):
        wanted = [
            max(
                min(1.0, float(fit) / STRICT)
                for fit, (name, color, texture) in zip(fit_K, kinds(), strict=True)
                if name == w.name and texture == "solid" and color == (w.color or color)
            )
            for w in record.include
        ]
        found.append(float(np.mean(wanted)))
    return found
