"""Job that measures the quality of a reward model on held-out pairs."""

from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.jobs.files import RewardQualityJob
from dpo_core.jobs.start import device
from dpo_core.models.load import load_tokenizer
from dpo_core.models.reward_model import RewardModel
from dpo_core.ranks import JobRanks
from dpo_core.rewards.model import score
from dpo_core.rewards.quality import reward_quality

FILE = RewardQualityJob


def run(job: RewardQualityJob, ranks: JobRanks) -> dict[str, Any]:
    """The `RewardQuality`, empty where no pair is held out."""
    frame = pd.read_parquet(job.pairs)
    tokenise = Tokenise(load_tokenizer(Path(job.model)), job.tokens)
    held_out, _ = tokenise.pairs(frame[frame["split"] == "eval"].to_dict("records"))
    if not held_out:
        return {}
    model = RewardModel.load(Path(job.model)).to(device())
    sequences = [s for p in held_out for s in (p.chosen, p.rejected)]
    rewards = score(model, sequences, job.precision, ranks=ranks)
    lengths = [s.targets for s in sequences]
    # The gain scales the rewards to a standard deviation of one.
    scale = float(model.gain)
    quality = reward_quality(
        rewards[0::2], rewards[1::2], lengths[0::2], lengths[1::2], scale=scale, seed=job.seed
    )
    return quality.model_dump(mode="json")
