"""Rewards of scenes by what the detector sees of the prompt's record."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from dpo_core.images.records import Record, Thing, read_record, requirements
from dpo_core.images.scenes import decode, detect

Kind = Literal["exact", "binary", "words"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""exact: the share of the record's requirements that hold. binary: 1 where all hold, as GenEval counts.
words: the share of its words that occur in the image; blind to whose colour it is, how many, and where."""
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
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[str]
    ) -> list[float]:
        """Rewards between 0 and 1.

        Args:
            completions: images in their canonical text.
            metadata: the prompts' records as JSON.
        """
        found = detect(decode(np.array([list(map(int, image.split())) for image in completions])))
        return [reward(self.kind, read_record(m), things) for m, things in zip(metadata, found, strict=True)]


def reward(kind: Kind, record: Record, things: Sequence[Thing]) -> float:
    """The reward of one image with these objects."""
    if kind == "words":
        wanted = [(field, value) for w in record.include for field in _FIELDS if (value := getattr(w, field))]
        return sum(any(getattr(t, field) == value for t in things) for field, value in wanted) / len(wanted)
    holds = [requirement.holds for requirement in requirements(record, things)]
    return float(all(holds)) if kind == "binary" else sum(holds) / len(holds)


_FIELDS = ("name", "color", "texture")
