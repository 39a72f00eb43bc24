"""Job that makes captioned images of solid scenes."""

from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.images.codec import as_png
from dpo_core.images.solid import captioned
from dpo_core.jobs.files import SceneCaptionsJob
from dpo_core.ranks import JobRanks

FILE = SceneCaptionsJob


def run(job: SceneCaptionsJob, ranks: JobRanks) -> dict[str, Any]:
    """Write `captions.parquet`."""
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": str(number), "prompt": prompt, "image": as_png(image)}
        for number, (prompt, image) in enumerate(captioned(job.count, job.seed, job.wrong))
    ]
    partial = out / "captions.part"
    pd.DataFrame(rows).to_parquet(partial, index=False)
    partial.rename(out / "captions.parquet")
    return {"images": len(rows)}
