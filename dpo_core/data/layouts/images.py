"""Adapters for images: GenEval's records, T2I-CompBench's lists, and pairs of Pick-a-Pic and HPDv2.

The answers of pairs name their images, see `images.files`.
"""

from pathlib import Path
from typing import Any

from dpo_core.data.layouts.adapter import Adapter
from dpo_core.data.layouts.fields import (
    Fault,
    ImageFolder,
    PairFields,
    PromptFields,
    Ranked,
    Row,
    SourceRow,
    compact,
    has,
    required_number,
    text,
)
from dpo_core.errors import DataError
from dpo_core.images.files import BadImage, name_of, store
from dpo_core.images.records import read_record


def geneval(row: Row) -> PromptFields:
    """A prompt with what its image must show (GenEval's `evaluation_metadata.jsonl`), kept as metadata."""
    prompt = text(row, "prompt")
    try:
        record = compact({name: row[name] for name in row if row[name] is not None})
        read_record(record)
    except DataError as error:
        raise Fault(error.problem) from error
    except (TypeError, ValueError) as error:  # bytes, NaN
        raise Fault(f"the row is not a record as JSON ({error})") from error
    return PromptFields(prompt, False, metadata=record)


def compbench(row: Row) -> PromptFields:
    """A line of a text file; the file's name tells the category, as in T2I-CompBench's `color_train.txt`."""
    stem = text(row, "file").removeprefix("compbench_").partition(".")[0]
    category = stem.removesuffix("_train").removesuffix("_val")
    return PromptFields(text(row, "line"), False, metadata=compact({"category": category}))


# --- pairs of images --------------------------------------------------------------------------------------


def pickapic(row: Row) -> PairFields | None:
    """Two images as bytes with labels 1 and 0; 0.5 and 0.5, or no label, is undecided."""
    labels = [required_number(row, name) for name in ("label_0", "label_1")]
    if sorted(labels) not in ([0, 1], [0.5, 0.5]):
        raise Fault(f"label_0 and label_1 are {labels[0]:g} and {labels[1]:g}, not 1 and 0")
    if labels[0] == labels[1] or row.get("has_label") is False:
        return None
    better = int(labels[1] == 1)
    names = [_stored(row, name) for name in ("jpg_0", "jpg_1")]
    return PairFields(text(row, "caption"), False, names[better], names[1 - better])


def hpd(row: Row) -> PairFields | None:
    """HPDv2's training rows: two paths and which one people preferred."""
    paths: Any = row.get("file_path")
    votes: Any = row.get("human_preference")
    if not (_is_list(paths, 2) and _is_list(votes, 2) and all(type(vote) is int for vote in votes)):
        raise Fault("file_path and human_preference are not lists of two, of paths and numbers")
    if sorted(votes) != [0, 1]:
        return None
    names = [_placed(row, path) for path in paths]
    return PairFields(text(row, "prompt"), False, names[votes.index(1)], names[votes.index(0)])


def hpd_ranked(row: Row) -> Ranked:
    """HPDv2's test rows: paths and their ranks, 1 the best."""
    paths: Any = row.get("image_path")
    ranks: Any = row.get("rank")
    if not _is_list(paths) or not _is_list(ranks, len(paths)) or not all(type(r) is int for r in ranks):
        raise Fault("image_path and rank are not lists of the same length, of paths and numbers")
    where = row.number if isinstance(row, SourceRow) else 0
    answers = [(_placed(row, path), -float(rank), where) for path, rank in zip(paths, ranks, strict=True)]
    return Ranked(text(row, "prompt"), False, "", answers, scored=False)


def _is_list(value: object, length: int | None = None) -> bool:
    return isinstance(value, list) and (length is None or len(value) == length)


def _folder(row: Row) -> ImageFolder:
    return row.images if isinstance(row, SourceRow) else ImageFolder(Path(), keeps=False)


def _stored(row: Row, column: str) -> str:
    value: Any = row.get(column)
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise Fault(f"{column} holds no bytes")
    folder = _folder(row)
    if not folder.keeps:
        raise Fault("the rows hold images, and data.images names no folder to keep them in")
    return store(content, folder.path)


def _placed(row: Row, path: object) -> str:
    if not isinstance(path, str):
        raise Fault("the path of an image is not text")
    try:
        return name_of(_folder(row).path / path)
    except BadImage as error:
        raise Fault(f"the image {path} {error}") from error


FORMATS = {
    "pickapic": Adapter(
        "a caption, jpg_0, jpg_1, label_0 and label_1 (Pick-a-Pic)",
        pickapic,
        ("caption", "jpg_0", "jpg_1", "label_0", "label_1"),
    ),
    "hpd": Adapter(
        "a prompt, two file_path and human_preference (HPDv2, training)",
        hpd,
        ("prompt", "file_path", "human_preference"),
    ),
    "hpd-ranked": Adapter(
        "a prompt, several image_path and their rank (HPDv2, test)",
        hpd_ranked,
        ("prompt", "image_path", "rank"),
        lambda row: has(row, "prompt", "image_path", "rank"),
        ranked=True,
    ),
    "geneval": Adapter(
        "a prompt with the objects that its image must show (GenEval)",
        geneval,
        ("tag", "include", "prompt"),
        kind="prompts",
    ),
    "compbench": Adapter(
        "lines of a text file, a prompt of an image each (T2I-CompBench)",
        compbench,
        ("line", "file"),
        kind="prompts",
    ),
}
