"""Suites of the world of scenes: images of prompts, judged exactly by what the detector sees.

`scenes` asks for what T2I-CompBench asks for, the kind of prompts that a run of scenes is trained on;
`scenes_gen` asks for GenEval's categories in its wording. As in GenEval, the score is the mean of the
categories' means, whatever the number of their prompts.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.prompt import Prompt
from dpo_core.evaluation.results import Item, MeasureSpec, Outcome
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.rows import Row, category_weight, read_records, sample_rows
from dpo_core.images.prompts import HELD_OUT, PROMPT_FILES, Domain, within
from dpo_core.images.records import read_record, requirements
from dpo_core.images.scenes import clutter, decode, detect

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

SCORE = MeasureSpec(
    name="score", label="correct images, mean over the categories", kind="mean", by_subset=False
)
CORRECT = MeasureSpec(name="correct", label="correct images")
HELD_OUT_CONTENT = MeasureSpec(
    name="held_out", label="correct images of a ring, purple or four of a kind", by_subset=False
)
CLUTTER = MeasureSpec(name="clutter", label="painted pixels outside of objects", better="neither")


def read(path: Path) -> list[Row]:
    """The records of a file, one JSON object a line; an id is the line's number, from 0."""
    return [{"id": str(i), **row} for i, row in enumerate(read_records(path))]


def run(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """Sample images of every prompt; the values of a prompt are means over its images.

    Raises:
        RecipeError: the model does not make images of this world.
    """
    images = subject.tokenise.images
    if images is None or images.codec != "scenes":
        raise RecipeError(
            f"{subject.name} does not make images of the world of scenes",
            "Remove the suite from suites.names",
        )
    chosen = sample_rows(rows, config.limit, config.seed)
    records = [read_record(row["record"]) for row in chosen]
    asked = [Prompt(record.prompt, False) for record in records for _ in range(config.samples)]
    answers = subject.answers(asked, config.sampling, seed=config.seed)
    pixels = decode(np.array([list(map(int, answer.split())) for answer in answers]))
    found = detect(pixels)
    tags = Counter(record.tag for record in records)
    items = []
    for place, record in enumerate(records):
        own = range(place * config.samples, (place + 1) * config.samples)
        correct = sum(all(r.holds for r in requirements(record, found[i])) for i in own) / len(own)
        values = {
            "score": correct * category_weight(tags, record.tag),
            "correct": correct,
            **({} if within(record, HELD_OUT) else {"held_out": correct}),
            "clutter": sum(clutter(pixels[i], found[i]) for i in own) / len(own),
        }
        name, answer = chosen[place]["id"], json.dumps([answers[i] for i in own])
        subset, prompt = record.tag, record.prompt
        items.append(Item(id=name, cluster=name, subset=subset, prompt=prompt, answer=answer, values=values))
    settings = {"samples": config.samples, "sampling": config.sampling.model_dump(mode="json")}
    specs = [SCORE, CORRECT, HELD_OUT_CONTENT, CLUTTER]
    return Outcome(items=items, specs=specs, facts={"images": len(answers)}, settings=settings)


_ABOUT: dict[Domain, tuple[str, str, str]] = {
    "comp": ("scenes", "Scenes", "Images of T2I-CompBench's kinds of prompts, judged exactly"),
    "gen": ("scenes_gen", "Scenes, GenEval", "Images of GenEval's kinds of prompts, judged exactly"),
}
SUITES = [
    Suite(
        name=name,
        title=title,
        about=about,
        files=(PROMPT_FILES[domain].name,),
        source="this package",
        packaged=PROMPT_FILES[domain],
        run=run,
        read=read,
    )
    for domain, (name, title, about) in _ABOUT.items()
]
