"""Job that draws completions of prompts, scores them with a known reward, and makes pairs of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.convert import with_sound_images
from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.layouts.fields import PairFields, Record
from dpo_core.data.records import to_frame
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import NeedsNewSettings
from dpo_core.generation.config import seed_for
from dpo_core.generation.generate import Completion, sample
from dpo_core.generation.images import sample_images
from dpo_core.images.files import inline_name
from dpo_core.jobs.files import PairSamplingJob
from dpo_core.jobs.start import device
from dpo_core.methods.pair_sampling import PairSamplingConfig, ScoredSample, pair_up
from dpo_core.models.denoiser import load_denoiser
from dpo_core.models.folder import is_denoiser
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.ranks import JobRanks, Ranks
from dpo_core.rewards.images import score_images
from dpo_core.rewards.model import metadata_of, scorer
from dpo_core.scoring import flops as cost
from dpo_core.scoring.model_shape import shape_of

FILE = PairSamplingJob

# Batches that are drawn with one seed; the samples depend on it.
_BATCHES_A_SEED = 8


def run(job: PairSamplingJob, ranks: JobRanks) -> dict[str, Any] | None:
    """Rank 0 writes the pairs and returns their counts.

    Raises:
        StageFailed: no two samples of a prompt make a pair.
    """
    config, model_path = job.config, Path(job.model)
    if is_denoiser(model_path):
        return _of_denoiser(job, ranks)
    tokenise = Tokenise(load_tokenizer(model_path), job.tokens)
    room = config.sampling.max_new_tokens
    prompts = [(row, tokenise.prompt_of(row, room)) for row in read_parquet(job.prompts)]
    rows = [row for row, ids in prompts if ids]
    repeated = [(row, ids) for row, ids in prompts if ids for _ in range(config.samples_per_prompt)]
    model = load_model(model_path).to(device())
    drawn = _draw(ranks, model, [ids for _, ids in repeated], job, tokenise.stop_ids)
    sequences = [TokenSequence(ids, c.ids) for (_, ids), c in zip(repeated, drawn, strict=True)]
    score = scorer(job.reward, tokenise, "fp32", ranks=ranks, metadata=metadata_of(rows))
    rewards = score(sequences, [row["prompt"] for row, _ in repeated])
    if ranks.rank != 0:
        return None
    texts = [tokenise.text(s.completion, s.prompt) for s in sequences]
    lengths = [(len(s.prompt), len(s.completion)) for s in sequences]
    counts = _write_pairs(job, rows, texts, [c.ended for c in drawn], rewards)
    return counts | {"flops": cost.sampling(shape_of(model), lengths)}


def _of_denoiser(job: PairSamplingJob, ranks: Ranks) -> dict[str, Any] | None:
    """Images of the prompts to train on; the pairs hold them."""
    rows = [row for row in read_parquet(job.prompts) if row["split"] == "train"]
    asked = [row["prompt"] for row in rows for _ in range(job.config.samples_per_prompt)]
    denoiser = load_denoiser(Path(job.model)).on_device()
    files = sample_images(denoiser, asked, job.config.sampling, seed=seed_for(job.seed, "pairs"), ranks=ranks)
    rewards = score_images(job.reward, asked, files, metadata_of(rows), ranks)
    if ranks.rank != 0:
        return None
    return _write_pairs(job, rows, [inline_name(file) for file in files], [True] * len(files), rewards)


def _write_pairs(
    job: PairSamplingJob,
    rows: list[dict[str, Any]],
    texts: list[str],
    ended: list[bool],
    rewards: list[float],
) -> dict[str, Any]:
    """Write the pairs, and return the counts.

    Raises:
        NeedsNewSettings: no two samples of a prompt make a pair.
    """
    frame, counts = pair_rows(rows, texts, ended, rewards, job.config)
    if frame.empty:
        raise NeedsNewSettings(
            f"no pair could be made of {counts['samples']} samples: {counts['ties']} candidate pairs are "
            f"ties under the reward {job.reward}, the other samples are empty or not valid text",
            "Draw more or longer samples (pairs.*), or choose a reward that distinguishes them",
        )
    frame.to_parquet(job.out, index=False)
    return counts


def _draw(
    ranks: Ranks, model: Any, prompts: Sequence[Any], job: PairSamplingJob, stop_ids: frozenset[int]
) -> list[Completion]:
    sampling = job.config.sampling
    portion = sampling.batch_size * _BATCHES_A_SEED
    return [
        completion
        for start in range(0, len(prompts), portion)
        for completion in sample(
            model,
            prompts[start : start + portion],
            sampling,
            eos_id=stop_ids,
            seed=seed_for(job.seed, "pairs", start),
            ranks=ranks,
        )
    ]


def pair_rows(
    rows: list[dict[str, Any]],
    texts: list[str],
    ended: list[bool],
    rewards: list[float],
    config: PairSamplingConfig,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Pairs of every prompt as a canonical table that keeps each prompt's split, and the counts."""
    records: list[Record] = []
    numbers: list[int] = []
    splits: list[str] = []
    ties = 0
    size = config.samples_per_prompt
    for index, row in enumerate(rows):
        scored = [
            ScoredSample(text, end, value)
            for text, end, value in zip(
                texts[index * size : (index + 1) * size],
                ended[index * size : (index + 1) * size],
                rewards[index * size : (index + 1) * size],
                strict=True,
            )
            # Leave out empty completions, and those truncated inside a character, which are not valid text.
            if text.strip() and "�" not in text
        ]
        pairs, tied = pair_up(scored, config) if len(scored) > 1 else ([], 0)
        ties += tied
        for better, worse in pairs:
            pair = PairFields(
                row["prompt"],
                bool(row["chat"]),
                better.text,
                worse.text,
                chosen_ended=better.ended,
                rejected_ended=worse.ended,
                tools=row.get("tools", ""),
                source=row.get("source", ""),
            )
            records.append(with_sound_images(pair))
            numbers.append(int(row["row"]))
            splits.append(row["split"])
    frame = to_frame(records, "pairs", numbers).assign(split=pd.array(splits, dtype="string[pyarrow]"))
    mean = sum(rewards) / len(rewards)
    return frame, {"samples": len(texts), "pairs": len(frame), "ties": ties, "mean_reward": mean}
