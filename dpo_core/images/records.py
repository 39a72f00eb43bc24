"""What a prompt asks of an image, in GenEval's form, and whether the objects of an image fulfil it.

The rules follow GenEval (Ghosh et al. 2023, arXiv 2310.11513): the most confident objects of a class are
looked at, as many as were asked for; `exclude` names counts that must not be reached; a relation is judged by
the offset of the centres. `texture` is this project's addition. The field names are those of GenEval's
`evaluation_metadata.jsonl`, so that a record can go to its own scripts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import DataError

Relation = Literal["left of", "right of", "above", "below"]

_SHRINK = 0.1
"""A relation has to be this share of both sizes beyond the middle."""


class Box(NamedTuple):
    """Edges in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Thing:
    """An object of an image."""

    name: str
    color: str
    texture: str
    box: Box
    confidence: float = 1.0
    """Between 0 and 1."""


class Wanted(Config):
    """Objects of one class that a prompt asks for."""

    name: str = Field(alias="class")
    count: int = Field(1, ge=1)
    color: str | None = None
    texture: str | None = None
    position: tuple[Relation, int] | None = None
    """The relation to another entry of `include`, and that entry's index."""


class Record(Config):
    """A prompt with what it asks for."""

    tag: str
    include: tuple[Wanted, ...] = Field(min_length=1)
    exclude: tuple[Wanted, ...] = ()
    """Fails where an image has at least `count` objects of the class."""
    prompt: str

    def to_json(self) -> str:
        """One line, as in GenEval's file of metadata."""
        fields = self.model_dump(by_alias=True, exclude_defaults=True, mode="json")
        # GenEval's reader expects the count of each entry.
        for part in ("include", "exclude"):
            for entry, wanted in zip(fields.get(part, ()), getattr(self, part), strict=True):
                entry["count"] = wanted.count
        return json.dumps(fields)


def read_record(text: str) -> Record:
    """A record from one line of GenEval's metadata.

    Raises:
        DataError: it is not a record, or an index in it points at no entry.
    """
    try:
        record = Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise DataError(f"{where} of the image metadata {text[:80]!r}: {first['msg']}") from None
    for wanted in record.include:
        if wanted.position and not 0 <= wanted.position[1] < len(record.include):
            raise DataError(
                f"the metadata of {record.prompt!r} places {wanted.name} by entry {wanted.position[1]}, "
                f"and include has {len(record.include)} entries, counted from 0"
            )
    return record


@dataclass(frozen=True)
class Requirement:
    """One thing that a record asks for."""

    text: str
    holds: bool


def requirements(record: Record, things: Sequence[Thing]) -> list[Requirement]:
    """Each requirement of a record, and whether the objects of an image fulfil it."""
    ranked = sorted(things, key=lambda thing: -thing.confidence)
    chosen = [[t for t in ranked if t.name == wanted.name][: wanted.count] for wanted in record.include]
    found: list[Requirement] = []
    complete: list[bool] = []
    for wanted, group in zip(record.include, chosen, strict=True):
        begin = len(found)
        enough = len(group) >= wanted.count
        found.append(Requirement(f"{wanted.count} {wanted.name}", enough))
        if wanted.color:
            holds = enough and all(thing.color == wanted.color for thing in group)
            found.append(Requirement(f"{wanted.color} {wanted.name}", holds))
        if wanted.texture:
            holds = enough and all(thing.texture == wanted.texture for thing in group)
            found.append(Requirement(f"{wanted.texture} {wanted.name}", holds))
        if wanted.position:
            relation, index = wanted.position
            holds = enough and index < len(complete) and complete[index]
            holds = holds and all(relation in relations(a.box, b.box) for a in group for b in chosen[index])
            found.append(Requirement(f"{wanted.name} {relation} {record.include[index].name}", holds))
        complete.append(all(requirement.holds for requirement in found[begin:]))
    for wanted in record.exclude:
        count = sum(thing.name == wanted.name for thing in things)
        found.append(Requirement(f"fewer than {wanted.count} {wanted.name}", count < wanted.count))
    return found


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` lies from `b`: up to two of left of, right of, above, below."""
    x = (a.left + a.right - b.left - b.right) / 2
    y = (a.top + a.bottom - b.top - b.bottom) / 2
    shrunk_x = _toward_zero(x, _SHRINK * (a.right - a.left + b.right - b.left))
    shrunk_y = _toward_zero(y, _SHRINK * (a.bottom - a.top + b.bottom - b.top))
    if abs(shrunk_x) < 1e-3 and abs(shrunk_y) < 1e-3:
        return set()
    distance = math.hypot(x, y)
    names = {
        "left of": shrunk_x / distance < -0.5,
        "right of": shrunk_x / distance > 0.5,
        "above": shrunk_y / distance < -0.5,
        "below": shrunk_y / distance > 0.5,
    }
    return {name for name, holds in names.items() if holds}


def _toward_zero(value: float, by: float) -> float:
    return math.copysign(max(abs(value) - by, 0.0), value)
