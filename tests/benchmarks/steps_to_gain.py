"""How many steps kl_plus takes to a gain of images that DPO also reaches.

    python -m tests.benchmarks.steps_to_gain RUN [POLICY]

RUN is the folder of a finished run of `scenes-diffusion` that has trained its reference, POLICY one of its
policies (DPO). The reference is aligned again on the pairs with the policy's settings, as kl_plus with c = 0
(DPO), 1/2 and 1, with three seeds. On the way the policies draw the prompts of the suite from the same noise
as the reference. xDPO (Electronics 14(15):2939), whose loss is not public, claims 1.5 times the training
efficiency of DPO.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.suites.rows import category_weight
from dpo_core.generation.images import sample_images
from dpo_core.images.codec import read_pixels
from dpo_core.images.records import Record
from dpo_core.images.rewards import rewards_of
from dpo_core.images.solid import prompts
from dpo_core.methods.diffusion import DiffusionConfig
from dpo_core.methods.job import Job
from dpo_core.models.denoiser import Denoiser, load_denoiser
from dpo_core.ranks import SingleRank
from dpo_core.statistics.estimates import Estimate, bootstrap_mean, bootstrap_statistic
from dpo_core.trainers.diffusion import build
from dpo_core.training.distributed import start_distributed
from dpo_core.training.engine import load_full_state
from tasks.recipe.read import load_recipe
from tasks.runs.references import LIST
from tasks.stages.data import GATES
from tasks.stages.prepare_sft import SFT
from tasks.store.store import Store

STEPS = (10, 20, 30, 40)
TERMS = (0.0, 0.5, 1.0)
SEEDS = (0, 1, 2)
Curve = NDArray[np.float64]
"""(prompts, checkpoints): gains of a prompt's images over the reference's, the mean over the seeds."""


def steps_to(target: float, gain_S: NDArray[np.float64], steps: Sequence[int]) -> float | None:
    """The step at which the line from (0, 0) through the points first reaches the target, if it does."""
    points = [(0.0, 0.0), *zip(map(float, steps), gain_S.tolist(), strict=True)]
    for (before, low), (after, high) in pairwise(points):
        if high >= target > low:
            return before + (after - before) * (target - low) / (high - low)
    return None


def speed_up(*gains_PS: Curve, share: float, steps: Sequence[int]) -> float | None:
    """DPO's steps over the other's, to a share of the largest gain that both reach; None without such a gain.

    Args:
        gains_PS: DPO's curve, then the other's.
    """
    dpo_S, other_S = (np.mean(gains, axis=0) for gains in gains_PS)
    target = share * min(dpo_S.max(), other_S.max())
    if target <= 0:
        return None
    first, second = steps_to(target, dpo_S, steps), steps_to(target, other_S, steps)
    return first / second if first and second else None


def speed_ups(
    curves: dict[float, Curve], steps: Sequence[int] = STEPS
) -> dict[tuple[float, float], Estimate | None]:
    """By c and share of the gain, with intervals by prompt; None where too few resamples have a gain."""
    return {
        (c, share): bootstrap_statistic(partial(speed_up, share=share, steps=steps), [curves[0.0], curve])
        for c, curve in curves.items()
        if c
        for share in (0.5, 0.9)
    }


def hits(denoiser: Denoiser, asked: Sequence[Record], config: SuiteConfig) -> NDArray[np.float64]:
    """(P,) the share of correct images of each prompt, whose mean is that of the categories."""
    every = [record for record in asked for _ in range(config.samples)]
    names = [record.prompt for record in every]
    files = sample_images(denoiser, names, config.sampling, seed=config.seed, ranks=SingleRank())
    right = np.array(rewards_of("binary", every, read_pixels(files))).reshape(len(asked), -1).mean(-1)
    tags = Counter(record.tag for record in asked)
    return right * np.array([category_weight(tags, record.tag) for record in asked])


def scores(model: Path, data: Path, config: DiffusionConfig, suite: SuiteConfig, seed: int) -> Curve:
    """(P, S) scores at each checkpoint of one training."""
    start_distributed(config.engine)
    columns = []
    with tempfile.TemporaryDirectory() as work:
        job: dict[str, Any] = {
            "method": "diffusion", "settings": {}, "model": str(model), "data": str(data), "tokens": {},
            "out": f"{work}/out", "work": work, "seed": seed, "policy_is_reference": True,
        }  # fmt: skip
        trainer, _ = build(Job.model_validate(job), config)
        for trainer.total_steps in STEPS:
            last = trainer.train()
            policy = load_denoiser(model)
            load_full_state(policy.network, trainer.engine.full_state())
            columns.append(hits(policy, prompts(held_out=True), suite))
            errors = f"errors {last['error/chosen']:.2f} and {last['error/rejected']:.2f}"
            print(f"  step {trainer.total_steps}: score {columns[-1].mean():.3f}, {errors}", flush=True)
    return np.stack(columns, axis=-1)


def main(folder: str, policy: str = "DPO") -> None:
    """Print the gains and the ratios of steps."""
    run = Path(folder)
    recipe, store = load_recipe(str(run / "recipe.yaml")), Store(run.parent.parent)
    lines = map(json.loads, (run / LIST).read_text().splitlines())
    made = {line["stage"]: store.peek(line["stage"], line["key"]) for line in lines}
    model, pairs = made[SFT.name], made[GATES["pairs"].name]
    assert model is not None
    assert pairs is not None
    frame = pd.read_parquet(pairs.path / "data.parquet")
    settings = recipe.policies[policy].settings.model_dump(mode="json") | {"max_steps": STEPS[-1]}
    settings["engine"] |= {"processes": 1, "threads": None}
    suite = recipe.suites.settings
    reference_P = hits(load_denoiser(model.path), prompts(held_out=True), suite)
    print(f"the reference's score {reference_P.mean():.3f}", flush=True)
    curves: dict[float, Curve] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "pairs.parquet"
        frame[(frame["split"] == "train") & (frame["fault"] == "")].to_parquet(data, index=False)
        for c in TERMS:
            config = DiffusionConfig.model_validate(
                settings | {"objective": "kl_plus", "parameters": {"c": c}}
            )
            by_seed = []
            for seed in SEEDS:
                print(f"c {c}, seed {seed}", flush=True)
                by_seed.append(scores(model.path, data, config, suite, seed))
            curves[c] = np.mean(by_seed, axis=0) - reference_P[:, None]
    for c, curve in curves.items():
        told = [f"{step}: {bootstrap_mean(curve[:, i])}" for i, step in enumerate(STEPS)]
        print(f"c {c}, gain by steps: {'; '.join(told)}")
    for (c, share), ratio in speed_ups(curves).items():
        print(f"c {c}, to {share:.0%} of the common gain, DPO's steps over kl_plus's: {ratio}")


if __name__ == "__main__":
    main(*sys.argv[1:])
