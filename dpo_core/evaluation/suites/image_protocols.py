"""GenEval and T2I-CompBench, whose images are judged by their own scripts.

A first call samples the images and writes them as the scripts expect them (`images.protocols`), in a folder
of `settings.images` that is named by everything that decides them; it ends with what to run. When the results
lie in that folder, the same call reads them. GenEval's detector and T2I-CompBench's models need environments
of their own, so nothing of them runs here.
"""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_core.errors import DataError, RecipeError, StageFailed
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.prompt import Prompt
from dpo_core.evaluation.results import Item, MeasureSpec, Outcome
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.rows import Row, category_weight, read_records, sample_rows
from dpo_core.generation.images import sample_images
from dpo_core.images.codec import Pixels, as_images, read_pixels
from dpo_core.images.protocols import (
    GENEVAL_RESULTS,
    VQA_RESULTS,
    GenEvalRow,
    VqaRow,
    read_compbench,
    read_geneval,
    write_compbench,
    write_geneval,
)
from dpo_core.images.records import read_record
from dpo_core.models.folder import is_denoiser
from dpo_core.models.image_codec import pixels_of
from dpo_core.system import digest_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from dpo_core.evaluation.model_under_test import ModelUnderTest

SCORE = MeasureSpec(
    name="score", label="mean over the categories of their means", kind="mean", by_subset=False
)
CORRECT = MeasureSpec(name="correct", label="correct images")
ANY = MeasureSpec(name="any", label="prompts with a correct image")
ANSWER = MeasureSpec(name="answer", label="score of the images")

_COMPBENCH_FILE = re.compile(
    r"(?:compbench_)?(color|shape|texture|spatial|3d_spatial|non_spatial|numeracy|complex)_val\.txt"
)
_COMPLEX_IMAGES = 10
"""Images of a prompt that T2I-CompBench's script for complex prompts takes for granted."""


def _require_folder(config: SuiteConfig) -> None:
    if config.images is None:
        raise RecipeError(
            "the suite's images are judged by its own scripts, and there is no folder for them",
            "Set settings.images to a folder",
        )


def _folder(name: str, subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Path:
    """The folder of these images."""
    sampling = config.sampling.model_dump(mode="json")
    facts = [subject.weights, rows, config.samples, config.seed, sampling]
    return Path(config.images or ".") / f"{name}-{digest_json(facts)[:16]}"


def _write(
    subject: "ModelUnderTest",
    prompts: Sequence[str],
    config: SuiteConfig,
    folder: Path,
    write: Callable[[Path, list[list["Image"]]], None],
) -> None:
    """Sample the images of every prompt, and write them at once: a folder that is there is complete."""
    pixels = _draw(subject, [prompt for prompt in prompts for _ in range(config.samples)], config)

    def store(_: int) -> None:
        images = as_images(pixels())
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part, [images[i : i + config.samples] for i in range(0, len(images), config.samples)])
        part.rename(folder)

    subject.ranks.map("images", [0], store)


def _draw(subject: "ModelUnderTest", prompts: Sequence[str], config: SuiteConfig) -> Callable[[], Pixels]:
    """Draw an image of each prompt; returns a function that decodes them.

    Raises:
        RecipeError: the model makes no images.
    """
    if is_denoiser(subject.path):
        drawn = subject.denoiser, prompts, config.sampling
        files = sample_images(*drawn, seed=config.seed, ranks=subject.ranks)
        return lambda: read_pixels(files)
    made = subject.tokenise.images
    if made is None:
        raise RecipeError(f"{subject.name} does not make images", "Remove the suite, or name another model")
    answers = subject.answers([Prompt(p, False) for p in prompts], config.sampling, seed=config.seed)
    return lambda: pixels_of(made, answers, subject.path)


def _exists(subject: "ModelUnderTest", path: Path) -> bool:
    """Whether a path exists; one rank looks for all, since another may be writing it."""
    (found,) = subject.ranks.map("found", [str(path)], lambda name: Path(name).exists())
    return bool(found)


# --- GenEval ----------------------------------------------------------------------------------------------


def run_geneval(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """Write the images, or read GenEval's results of them.

    Raises:
        StageFailed: the images wait to be judged.
        DataError: the results are not those of these images.
    """
    records = [read_record(row["record"]) for row in sample_rows(rows, config.limit, config.seed)]
    folder = _folder("geneval", subject, [{"record": r.to_json()} for r in records], config)
    images, results = folder / "images", folder / GENEVAL_RESULTS
    if not _exists(subject, folder):

        def write(part: Path, made: list[list["Image"]]) -> None:
            write_geneval(part / "images", zip(records, made, strict=True))

        _write(subject, [record.prompt for record in records], config, folder, write)
    if not _exists(subject, results):
        raise StageFailed(
            f"the images of {subject.name} for geneval are in {images} and not judged yet",
            f"Run GenEval's evaluate_images.py {images} --outfile {results}, then the same command again",
        )
    by_prompt: dict[int, list[GenEvalRow]] = defaultdict(list)
    for row in read_geneval(results):
        by_prompt[_number_of(row, results)].append(row)
    tags, items = Counter(record.tag for record in records), []
    for number, record in enumerate(records):
        own = by_prompt.pop(number, [])
        if len({row.filename for row in own}) != config.samples or len(own) != config.samples:
            raise _not_of_these(
                results, f"{len(own)} results of prompt {number}, not {config.samples} of different images"
            )
        if {row.prompt for row in own} != {record.prompt} or {row.tag for row in own} != {record.tag}:
            raise _not_of_these(results, f"another prompt than {record.prompt!r} in folder {number}")
        correct = [float(row.correct) for row in own]
        mean = sum(correct) / len(correct)
        values = {"score": mean * category_weight(tags, record.tag), "correct": mean, "any": max(correct)}
        answer = "; ".join(row.reason for row in own if row.reason)
        items.append(_item(f"{number:05d}", record.tag, record.prompt, answer, values))
    if by_prompt:
        raise _not_of_these(results, f"results of a prompt {min(by_prompt)}, which was not asked for")
    return _outcome(items, [SCORE, CORRECT, ANY], folder, config)


def _number_of(row: GenEvalRow, results: Path) -> int:
    """The number of the prompt's folder, in the image's path `…/00000/samples/00000.png`."""
    parts = re.split(r"[\\/]", row.filename)
    if len(parts) < 3 or not parts[-3].isdecimal():
        raise _not_of_these(results, f"an image {row.filename!r}, which is in no prompt's folder")
    return int(parts[-3])


# --- T2I-CompBench ----------------------------------------------------------------------------------------


def compbench_files(file: Path) -> list[Path]:
    """The other categories' prompt files beside one of them."""
    return [p for p in sorted(file.parent.iterdir()) if _COMPBENCH_FILE.fullmatch(p.name) and p != file]


def read_prompts(path: Path) -> list[Row]:
    """The prompts of every category whose file lies beside this one, a line each."""
    rows: list[Row] = []
    for file in sorted([path, *compbench_files(path)]):
        found = _COMPBENCH_FILE.fullmatch(file.name)
        if found is None:
            raise DataError(f"{file} is not named as T2I-CompBench's prompts", "Name it color_val.txt, …")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read ({error})", "Check the path") from error
        rows += [{"category": found[1], "prompt": line.strip()} for line in lines if line.strip()]
    return rows


def run_compbench(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """Write the images, or read T2I-CompBench's results of them.

    Raises:
        StageFailed: the images of a category wait to be judged.
        DataError: the results are not those of these images.
    """
    categories: dict[str, list[str]] = defaultdict(list)
    for row in sample_rows(rows, config.limit, config.seed):
        categories[row["category"]].append(row["prompt"])
    if "complex" in categories and config.samples != _COMPLEX_IMAGES:
        raise RecipeError(
            f"T2I-CompBench's script for complex prompts needs {_COMPLEX_IMAGES} images of each",
            f"Set settings.samples to {_COMPLEX_IMAGES}, or take complex_val.txt out of the data folder",
        )
    asked = [{"category": c, "prompt": p} for c, prompts in categories.items() for p in prompts]
    folder = _folder("compbench", subject, asked, config)
    if not _exists(subject, folder):

        def write(part: Path, made: list[list["Image"]]) -> None:
            left = iter(made)
            listed = {name: [(p, next(left)) for p in prompts] for name, prompts in categories.items()}
            write_compbench(part / "images", listed)

        _write(subject, [row["prompt"] for row in asked], config, folder, write)
    images = folder / "images"
    if open_ones := [name for name in categories if not _exists(subject, _vqa_file(images / name))]:
        raise StageFailed(
            f"the images of {subject.name} for compbench are in {images}, and {', '.join(open_ones)} "
            f"{'is' if len(open_ones) == 1 else 'are'} not judged yet",
            "Run T2I-CompBench's script of each category with --out_dir=its folder, then the same command "
            "again",
        )
    tags, items = Counter(row["category"] for row in asked), []
    for name, prompts in categories.items():
        file = _vqa_file(images / name)
        answers = [row.answer for row in _all_of(read_compbench(file), len(prompts) * config.samples, file)]
        for place, prompt in enumerate(prompts):
            own = answers[place * config.samples : (place + 1) * config.samples]
            mean = sum(own) / len(own)
            values = {"score": mean * category_weight(tags, name), "answer": mean}
            items.append(_item(f"{name} {place}", name, prompt, json.dumps(own), values))
    return _outcome(items, [SCORE, ANSWER], folder, config)


def _vqa_file(category: Path) -> Path:
    """The results of a category: of complex prompts those of all parts together, else the only file."""
    found = sorted(category.rglob(VQA_RESULTS))
    whole = [file for file in found if file.parent.name == "annotation_3_in_1"]
    if category.name == "complex":
        found = whole
    if len(found) > 1:
        raise DataError(
            f"{category} has results of several scripts: {', '.join(str(f.parent) for f in found)}",
            "Leave those of the category's own script",
        )
    return found[0] if found else category / VQA_RESULTS


def _all_of(rows: list[VqaRow], count: int, file: Path) -> list[VqaRow]:
    if [row.question_id for row in rows] != list(range(count)):
        raise _not_of_these(file, f"{len(rows)} results, not one for each of the {count} images")
    return rows


# --- both -------------------------------------------------------------------------------------------------


def _item(name: str, tag: str, prompt: str, answer: str, values: dict[str, float]) -> Item:
    return Item(id=name, cluster=name, subset=tag, prompt=prompt, answer=answer, values=values)


def _outcome(items: list[Item], specs: list[MeasureSpec], folder: Path, config: SuiteConfig) -> Outcome:
    settings = {"samples": config.samples, "sampling": config.sampling.model_dump(mode="json")}
    facts = {"images": len(items) * config.samples, "folder": folder.name}
    return Outcome(items=items, specs=specs, facts=facts, settings=settings)


def _not_of_these(file: Path, what: str) -> DataError:
    return DataError(f"{file} has {what}", "Judge the images beside it again, all of them and no others")


SUITES = [
    Suite(
        name="geneval",
        title="GenEval",
        about="Images of its prompts, judged by its own scripts",
        files=("evaluation_metadata.jsonl", "geneval_metadata.jsonl"),
        source="https://github.com/djghosh13/geneval (prompts/evaluation_metadata.jsonl)",
        run=run_geneval,
        read=read_records,
        check=_require_folder,
    ),
    Suite(
        name="compbench",
        title="T2I-CompBench",
        about="Images of its prompts, judged by its own scripts",
        files=("color_val.txt", "compbench_color_val.txt"),
        source="https://github.com/Karine-Huang/T2I-CompBench (examples/dataset)",
        run=run_compbench,
        read=read_prompts,
        extra_files=compbench_files,
        check=_require_folder,
    ),
]
