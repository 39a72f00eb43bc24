"""GenEval's rules on made objects, and on its own file of prompts."""

import random
from pathlib import Path

import numpy as np
import pytest

from dpo_core.errors import DataError
from dpo_core.images.records import Box, Thing, read_record, relations, requirements

METADATA = Path(__file__).parents[4] / "shared" / "data" / "t2i" / "geneval_metadata.jsonl"


def _thing(name: str, x: float = 0, color: str = "red", confidence: float = 1.0) -> Thing:
    return Thing(name, color, "solid", Box(x, 0, x + 6, 6), confidence)


def _correct(line: str, things: list[Thing]) -> bool:
    return all(requirement.holds for requirement in requirements(read_record(line), things))


def _independent_relations(a: np.ndarray, b: np.ndarray) -> set[str]:
    """The rule as the paper's supplement describes it, on corners (2, 2)."""
    offset = a.mean(0) - b.mean(0)
    size = (a[1] - a[0]) + (b[1] - b[0])
    moved = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * size, 0, None)
    if (np.abs(moved) < 1e-3).all():
        return set()
    x, y = moved / np.sqrt((offset**2).sum())
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in found.items() if holds}


def test_relations_equal_an_independent_implementation_on_random_boxes():
    rng = random.Random(0)
    seen = set()
    for _ in range(1000):
        boxes = []
        for _ in range(2):
            x, y = rng.uniform(0, 90), rng.uniform(0, 90)
            boxes.append(Box(x, y, x + rng.uniform(1, 40), y + rng.uniform(1, 40)))
        expected = _independent_relations(*(np.array(box).reshape(2, 2) for box in boxes))
        assert relations(*boxes) == expected
        seen.add(frozenset(expected))
    assert len(seen) == 9


def test_a_count_must_be_met_and_not_exceeded():
    line = (
        '{"tag": "counting", "include": [{"class": "ring", "count": 2}], '
        '"exclude": [{"class": "ring", "count": 3}], "prompt": "a photo of two rings"}'
    )
    assert [_correct(line, [_thing("ring", 8 * i) for i in range(n)]) for n in range(5)] == [
        False, False, True, False, False,
    ]  # fmt: skip


def test_only_the_most_confident_objects_are_asked_for_their_colour():
    line = '{"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "…"}'
    assert _correct(line, [_thing("ring", confidence=0.9), _thing("ring", 8, "blue", confidence=0.5)])
    assert not _correct(line, [_thing("ring", confidence=0.5), _thing("ring", 8, "blue", confidence=0.9)])


def test_a_relation_fails_where_its_other_object_does():
    line = (
        '{"tag": "position", "include": [{"class": "ring", "count": 1, "color": "blue"}, '
        '{"class": "cross", "count": 1, "position": ["left of", 0]}], "prompt": "…"}'
    )
    assert _correct(line, [_thing("cross"), _thing("ring", 10, "blue")])
    assert not _correct(line, [_thing("cross"), _thing("ring", 10, "red")])
    assert not _correct(line, [_thing("cross", 10), _thing("ring", 0, "blue")])


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("no json", "Invalid JSON"),
        ('{"tag": "x", "include": [], "prompt": "p"}', "include"),
        ('{"tag": "x", "include": [{"class": "a", "position": ["beside", 0]}], "prompt": "p"}', "position"),
        ('{"tag": "x", "include": [{"class": "a", "position": ["above", 4]}], "prompt": "p"}', "entry 4"),
    ],
)
def test_a_bad_record_is_refused_with_its_field(line, names):
    with pytest.raises(DataError, match=names):
        read_record(line)


@pytest.mark.skipif(not METADATA.exists(), reason="GenEval's prompts are not beside this checkout")
def test_genevals_own_prompts_are_read():
    lines = METADATA.read_text().splitlines()
    records = [read_record(line) for line in lines]
    assert len(records) == 553
    assert all(read_record(record.to_json()) == record for record in records)
