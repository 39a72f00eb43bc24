"""Job that computes the rewards of answers with a reward model or a reward function."""

from pathlib import Path
from typing import Any

from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.jobs.files import ScoreJob
from dpo_core.jobs.start import device
from dpo_core.models.load import load_tokenizer
from dpo_core.ranks import JobRanks, Ranks
from dpo_core.rewards.functions import is_reward_model, load_reward
from dpo_core.rewards.model import scorer

FILE = ScoreJob


def run(job: ScoreJob, ranks: JobRanks) -> dict[str, Any]:
    """The rewards in the order of the rows."""
    rows = read_parquet(job.answers)
    rewards = _by_model(job, rows, ranks) if is_reward_model(job.reward) else _by_function(job, rows, ranks)
    return {"rewards": rewards}


def _by_model(job: ScoreJob, rows: list[dict[str, Any]], ranks: Ranks) -> list[float]:
    tokenise = Tokenise(load_tokenizer(Path(job.reward)), job.tokens)
    sequences = [tokenise.scored(row["prompt"], bool(row["chat"]), row["answer"]) for row in rows]
    score = scorer(job.reward, tokenise, "fp32", device=device(), ranks=ranks)
    return score(sequences, [row["prompt"] for row in rows])


def _by_function(job: ScoreJob, rows: list[dict[str, Any]], ranks: Ranks) -> list[float]:
    """Rewards by a reward function, which gets all answers in one call, on one rank."""
    prompts, answers = ([row[column] for row in rows] for column in ("prompt", "answer"))
    rewards: list[float]
    (rewards,) = ranks.map("rewards", [len(rows)], lambda _: load_reward(job.reward)(prompts, answers))
    return rewards
