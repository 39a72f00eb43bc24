"""The folder layouts of GenEval and T2I-CompBench: images for their own scripts, and their results read back.

GenEval: `<folder>/00000/metadata.jsonl` and `samples/00000.png …` for each prompt; its results are rows of
{filename, tag, prompt, correct, metadata}, and its score is the mean of the tags' means. T2I-CompBench: a
folder a category with `samples/<prompt>_<number>.png`; its scripts read the prompt back from the name, up to
the first underscore, and write `vqa_result.json`, rows of {question_id, answer}.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import DataError
from dpo_core.images.records import Record

if TYPE_CHECKING:
    from PIL.Image import Image


GENEVAL_RESULTS = "results.jsonl"
VQA_RESULTS = "vqa_result.json"


class GenEvalRow(Config, extra="ignore"):
    """A row of GenEval's results: one image."""

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str = ""
    metadata: str = ""


class VqaRow(Config, extra="ignore"):
    """A row of T2I-CompBench's results: one image."""

    question_id: int = Field(ge=0)
    answer: float = Field(ge=0, le=1)


def write_geneval(folder: Path, images: Iterable[tuple[Record, Sequence["Image"]]]) -> None:
    """Write the images of each record as GenEval's scripts expect them.

    Raises:
        DataError: the folder has files already: images of another run would be scored with these.
    """
    _require_empty(folder)
    for number, (record, samples) in enumerate(images):
        place = folder / f"{number:05d}" / "samples"
        place.mkdir(parents=True)
        (place.parent / "metadata.jsonl").write_text(record.to_json())
        for index, image in enumerate(samples):
            image.save(place / f"{index:05d}.png")


def read_geneval(file: Path) -> list[GenEvalRow]:
    """The rows of GenEval's results file.

    Raises:
        DataError: the file cannot be read, or a row is not of that form.
    """
    rows = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            try:
                rows.append(GenEvalRow.model_validate_json(line))
            except ValidationError as error:
                raise _bad_row(file, f"line {number}", error) from None
    if not rows:
        raise DataError(f"{file} has no results", "Run GenEval's evaluate_images.py on the images first")
    return rows


def geneval_score(rows: Iterable[GenEvalRow]) -> tuple[float, dict[str, float]]:
    """GenEval's score, the mean of the tags' means, and the mean of each tag."""
    by_tag: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_tag[row.tag].append(row.correct)
    means = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return sum(means.values()) / len(means), means


def write_compbench(folder: Path, images: Mapping[str, Iterable[tuple[str, Sequence["Image"]]]]) -> None:
    """Write the images of each category's prompts as T2I-CompBench's scripts expect them.

    Raises:
        DataError: a prompt cannot be a file name from which the scripts read it back, or the folder has
            files already.
    """
    _require_empty(folder)
    for category, prompts in images.items():
        place = folder / category / "samples"
        place.mkdir(parents=True)
        number = 0
        for prompt, samples in prompts:
            # The underscore ends the prompt for the scripts; a name has at most 255 bytes.
            if "_" in prompt or "/" in prompt or not prompt or len(f"{prompt}_000000.png".encode()) > 255:
                raise DataError(
                    f"the prompt {prompt[:80]!r} of {category} cannot be the name of a file: T2I-CompBench "
                    "reads prompts from names",
                    "Remove underscores and slashes from it, and keep it below 240 bytes",
                )
            for image in samples:
                image.save(place / f"{prompt}_{number:06d}.png")
                number += 1


def read_compbench(file: Path) -> list[VqaRow]:
    """The rows of a `vqa_result.json`, by question id.

    Raises:
        DataError: the file cannot be read, a row is not of that form, or an id is there twice.
    """
    try:
        content = json.loads(_text(file))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error})", "Run T2I-CompBench's scripts again") from None
    if not isinstance(content, list) or not content:
        raise DataError(f"{file} is not a list of results", "Run T2I-CompBench's scripts again")
    rows: dict[int, VqaRow] = {}
    for number, entry in enumerate(content):
        try:
            row = VqaRow.model_validate(
                {**entry, "answer": float(entry["answer"])} if isinstance(entry, dict) else entry
            )
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            raise _bad_row(file, f"row {number}", error) from None
        if row.question_id in rows:
            raise DataError(
                f"{file} has two results for question {row.question_id}", "Remove the results of older images"
            )
        rows[row.question_id] = row
    return [rows[key] for key in sorted(rows)]


def _require_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty", "Name a new folder: old images would be scored with these")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error})", "Check the path and its permissions") from error


def _bad_row(file: Path, where: str, error: Exception) -> DataError:
    why = (
        error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
    )
    return DataError(f"{where} of {file} is not a result: {why}", "Write the file with the official scripts")
