"""The data gate as a job: judge rows with the model's tokenizer, and write those that may go on."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.answers import measure_answers
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import ModelError
from dpo_core.jobs.start import start_ranks
from dpo_core.models.load import load_tokenizer
from dpo_core.training.liveness import LivenessMonitor
from expectations.gate import judge
from expectations.job_file import GateJob
from expectations.token_rules import Tokenisation

FILE = GateJob


def run(job: GateJob, monitor: LivenessMonitor) -> dict[str, Any] | None:
    """Rank 0 judges the rows, writes those that may go on, and returns the report and their counts.

    Raises:
        ModelError: the chat template refuses a row, where nothing may be left out.
    """
    ranks = start_ranks(Path(job.work), job.ranks, monitor)
    if ranks.rank != 0:
        return None
    frame = pd.read_parquet(job.rows)
    tokenise = Tokenise(load_tokenizer(Path(job.model)), job.tokens)
    if job.config.quarantine == "refuse":
        _check_template(frame, tokenise)
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        ranks.check()
        ranks.advance(rows - done)
        done = rows

    report, kept = judge(
        frame,
        subject=job.subject,
        config=job.config,
        docs_dir=Path(job.docs),
        tokenisation=Tokenisation(**tokenise.gate_settings()),
        baseline=job.baseline,
        tick=tick,
    )
    result: dict[str, Any] = {"report": report.model_dump(mode="json")}
    if report.refused:
        return result
    kept.to_parquet(job.out, index=False)
    held_out = kept[kept["split"] == "eval"].drop_duplicates(["prompt", "chat"])
    answers = measure_answers(kept, tokenise)
    return result | {
        "rows": len(kept),
        "sides": kept["split"].value_counts().to_dict(),
        "held_out_prompts": len(held_out),
        "written_as": tokenise.note_on(kept["chat"].tolist()),
        "answer_tokens": answers and answers.median,
        "answers_ended": answers and answers.complete,
        **_labels(kept, job.subject),
    }


def _labels(kept: pd.DataFrame, subject: str) -> dict[str, int]:
    """How many training rows there are of each label, or how many pairs say how sure theirs is."""
    train = kept[kept["split"] == "train"]
    if subject == "pairs":
        return {"with_agreement": int(train["agreement"].notna().sum())}
    if subject == "prompts":
        return {}
    label = train["label"]
    return {"desirable": int(label.sum()), "undesirable": int((~label).sum())}


def _check_template(frame: pd.DataFrame, tokenise: Tokenise) -> None:
    """Write one conversation of each order of roles, so that no template fails later, in the training."""
    seen: set[Any] = set()
    sound = frame[frame["chat"] & (frame["fault"] == "")]
    for row in sound.to_dict("records"):
        number, prompt, tools = row["row"], row["prompt"], row.get("tools") or ""
        roles = (bool(tools), *((turn["role"], *sorted(turn)) for turn in json.loads(prompt)))
        if roles in seen:
            continue
        seen.add(roles)
        try:
            tokenise.prompt(prompt, True, tools=tools)
        except ModelError as error:
            raise ModelError(f"row {number} of the data: {error.problem}", error.remedy) from error
