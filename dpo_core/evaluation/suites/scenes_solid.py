"""Suite of solid scenes: images that a diffusion model draws of held-out prompts, judged by the detector.

Every model begins with the same noise, so that differences of models are paired.
"""

from collections import Counter
from typing import TYPE_CHECKING

from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import Item, MeasureSpec, Outcome
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.rows import Row, category_weight, sample_rows
from dpo_core.evaluation.suites.scenes import CLUTTER, CORRECT, SCORE, read
from dpo_core.generation.images import sample_images
from dpo_core.images.codec import read_pixels
from dpo_core.images.records import read_record
from dpo_core.images.rewards import rewards_of
from dpo_core.images.scenes import SIDE, clutter, detect
from dpo_core.images.solid import PROMPT_FILE, graded
from dpo_core.models.folder import is_denoiser

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

GRADED = MeasureSpec(
    name="graded", label="fit of the objects, also of incorrect images", kind="mean", by_subset=False
)


def run(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """Draw images of every prompt; the values of a prompt are means over its images.

    Raises:
        RecipeError: the model is no diffusion model of this world.
    """
    if not is_denoiser(subject.path) or subject.denoiser.pixels != (SIDE, SIDE):
        raise RecipeError(
            f"{subject.name} is no diffusion model of images of {SIDE} x {SIDE} pixels",
            "Remove the suite, or name a model of solid scenes",
        )
    chosen = sample_rows(rows, config.limit, config.seed)
    records = [read_record(row["record"]) for row in chosen]
    asked = [record for record in records for _ in range(config.samples)]
    prompts = [record.prompt for record in asked]
    files = sample_images(subject.denoiser, prompts, config.sampling, seed=config.seed, ranks=subject.ranks)
    pixels = read_pixels(files)
    fits, right = graded(asked, pixels), rewards_of("binary", asked, pixels)
    painted = [clutter(image, things) for image, things in zip(pixels, detect(pixels), strict=True)]
    tags = Counter(record.tag for record in records)
    items = []
    for place, record in enumerate(records):
        own = range(place * config.samples, (place + 1) * config.samples)

        def mean(values: list[float], own: range = own) -> float:
            return sum(values[i] for i in own) / len(own)

        correct = mean(right)
        values = {
            "score": correct * category_weight(tags, record.tag),
            "correct": correct,
            "graded": mean(fits),
            "clutter": mean(painted),
        }
        name = chosen[place]["id"]
        items.append(Item(id=name, cluster=name, subset=record.tag, prompt=record.prompt, values=values))
    settings = {
        "samples": config.samples,
        "guidance": config.sampling.guidance,
        "denoising_steps": config.sampling.denoising_steps,
    }
    specs = [SCORE, CORRECT, GRADED, CLUTTER]
    return Outcome(items=items, specs=specs, facts={"images": len(files)}, settings=settings)


SUITES = [
    Suite(
        name="scenes_solid",
        title="Solid scenes",
        about="Images of a diffusion model of one or two solid objects, judged exactly",
        files=(PROMPT_FILE.name,),
        source="this package",
        packaged=PROMPT_FILE,
        run=run,
        read=read,
        version=2,
    )
]
