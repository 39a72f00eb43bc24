"""Job that samples images of solid scenes, judges them by the detector, and makes pairs of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpo_core.images.codec import as_png
from dpo_core.images.records import Record, requirements
from dpo_core.images.scenes import Pixels, clutter, detect
from dpo_core.images.solid import graded, prompts
from dpo_core.jobs.files import SceneImagesJob
from dpo_core.models.denoiser import load_denoiser
from dpo_core.ranks import JobRanks

FILE = SceneImagesJob

_AT_ONCE = 32


def run(job: SceneImagesJob, ranks: JobRanks) -> dict[str, Any]:
    """Write `images.parquet` and, of prompts to train on, `pairs.parquet`; return the scores by tag."""
    denoiser = load_denoiser(Path(job.model)).on_device()
    asked = [record for record in prompts(job.held_out)[: job.limit] for _ in range(job.samples)]
    parts = []
    for first in range(0, len(asked), _AT_ONCE):
        ranks.check()
        place = range(first, min(first + _AT_ONCE, len(asked)))
        parts.append(
            denoiser.sample(
                [asked[i].prompt for i in place],
                steps=job.steps,
                guidance=job.guidance,
                seeds=[job.seed * 1_000_003 + i for i in place],
            )
        )
    rows = judged(asked, np.concatenate(parts))
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(out / "images.parquet", index=False)
    pairs = [] if job.held_out else pairs_of(rows, job.seed)
    if pairs:
        pd.DataFrame(pairs).to_parquet(out / "pairs.parquet", index=False)
    tags = rows.groupby("tag")[["correct", "graded", "clutter"]].mean()
    return {
        "images": len(rows),
        "prompts": int(rows["prompt"].nunique()),
        "pairs": len(pairs),
        # As in GenEval, the mean of the tags' means.
        "score": float(tags["correct"].mean()),
        "tags": {str(tag): float(value) for tag, value in tags["correct"].items()},
        "graded": float(rows["graded"].mean()),
        "clutter": float(rows["clutter"].mean()),
    }


def judged(asked: list[Record], images_N: Pixels) -> pd.DataFrame:
    """A row for each image: {prompt, tag, image, correct, graded, clutter}."""
    found = detect(images_N)
    return pd.DataFrame(
        {
            "prompt": [record.prompt for record in asked],
            "tag": [record.tag for record in asked],
            "image": [as_png(image) for image in images_N],
            "correct": [
                float(all(r.holds for r in requirements(record, things)))
                for record, things in zip(asked, found, strict=True)
            ],
            "graded": graded(asked, images_N),
            "clutter": [clutter(image, things) for image, things in zip(images_N, found, strict=True)],
        }
    )


def pairs_of(rows: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """The best and the worst two images of each prompt as pairs; ties are left out."""
    pairs = []
    for prompt, group in rows.groupby("prompt", sort=True):
        ranked = group.sort_values(["correct", "graded"], ascending=False, kind="stable")
        for number in range(min(2, len(ranked) // 2)):
            best, worst = ranked.iloc[number], ranked.iloc[-1 - number]
            if (best["correct"], best["graded"]) > (worst["correct"], worst["graded"]):
                name = f"{seed}-{prompt}-{number}"
                pairs.append(
                    {"id": name, "prompt": prompt, "chosen": best["image"], "rejected": worst["image"]}
                )
    return pairs
