"""Rewards of scenes by what the detector sees of the prompt's record."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from dpo_core.images.records import Record, Thing, read_record, requirements
from dpo_core.images.scenes import Pixels, decode, detect
from dpo_core.images.solid import graded

Kind = Literal["exact", "binary", "words", "graded"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""exact: the share of the record's requirements that hold. binary: 1 where all hold, as GenEval counts.
words: the share of its words that occur in the image; blind to whose colour it is, how many, and where.
graded: the mean of binary and of how well the best windows fit solid objects of the record, which tells a bad
image from a worse one."""
REVISIONS: dict[Kind, int] = {"graded": 2}
"""Raised when a kind gives other rewards, so that what was made by it is made again."""
PREFIX = "scenes:"
"""Before a kind, in a recipe's reward."""


class SceneReward:
    """The reward of images of the world of scenes.

    Args:
        kind: what it sees.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.name = PREFIX + kind

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[Any], metadata: Sequence[str]
    ) -> list[float]:
        """Rewards between 0 and 1.

        Args:
            completions: images in their canonical text, or PIL images.
            metadata: the prompts' records as JSON.
        """
        return rewards_of(self.kind, list(map(read_record, metadata)), _pixels(completions))


def _pixels(completions: Sequence[Any]) -> Pixels:
    if isinstance(completions[0], str):
        return decode(np.array([list(map(int, image.split())) for image in completions]))
    return np.stack([np.asarray(image) for image in completions])


def rewards_of(kind: Kind, records: Sequence[Record], images_N: Pixels) -> list[float]:
    """The reward of each image."""
    seen: Kind = "binary" if kind == "graded" else kind
    rewards = [reward(seen, record, things) for record, things in zip(records, detect(images_N), strict=True)]
    if kind != "graded":
        return rewards
    return [(hit + fit) / 2 for hit, fit in zip(rewards, graded(records, images_N), strict=True)]


def reward(kind: Kind, record: Record, things: Sequence[Thing]) -> float:
    """The reward of one image with these objects."""
    if kind == "words":
        wanted = [(field, value) for w in record.include for field in _FIELDS if (value := getattr(w, field))]
        return sum(any(getattr(t, field) == value for t in things) for field, value in wanted) / len(wanted)
    holds = [requirement.holds for requirement in requirements(record, things)]
    return float(all(holds)) if kind == "binary" else sum(holds) / len(holds)


_FIELDS = ("name", "color", "texture")
