"""The data gate as a job: judge rows with the model's tokenizer, and write those that may go on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.answers import measure_answers
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.images.files import names_image, read_bytes
from dpo_core.models.folder import is_denoiser
from dpo_core.models.image_codec import texts_of
from dpo_core.models.load import load_tokenizer
from dpo_core.ranks import JobRanks
from expectations.features import Tokenisation
from expectations.gate import judge
from expectations.job_file import GateJob

FILE = GateJob

_ENCODED_AT_ONCE = 64


def run(job: GateJob, ranks: JobRanks) -> dict[str, Any]:
    """Judge the rows, write those that may go on, and return the report and their counts."""
    frame = pd.read_parquet(job.rows)
    tokenise = None  # a diffusion model reads prompts by an encoder of its own, and makes no tokens
    if not is_denoiser(Path(job.model)):
        tokenise = Tokenise(load_tokenizer(Path(job.model)), job.tokens)
        frame = with_codes(frame, tokenise)
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
        tokenisation=Tokenisation.of(tokenise) if tokenise else None,
        baseline=job.baseline,
        tick=tick,
    )
    result: dict[str, Any] = {"report": report.model_dump(mode="json")}
    if report.refused:
        return result
    kept.to_parquet(job.out, index=False)
    held_out = kept[kept["split"] == "eval"].drop_duplicates(["prompt", "chat"])
    answers = measure_answers(kept, tokenise) if tokenise else None
    return result | {
        "rows": len(kept),
        "sides": kept["split"].value_counts().to_dict(),
        "held_out_prompts": len(held_out),
        "written_as": tokenise.note_on(kept["chat"].tolist()) if tokenise else "",
        "answer_tokens": answers and answers.median,
        "answers_ended": answers and answers.complete,
        **_labels(kept, job.subject),
    }


def with_codes(frame: pd.DataFrame, tokenise: Tokenise) -> pd.DataFrame:
    """The rows of a model of images, with the images that answers name in the model's codes."""
    if tokenise.images is None:
        return frame
    frame = frame.copy()
    for column in frame.columns.intersection(["chosen", "rejected", "completion"]):
        named = frame[column].map(names_image)
        for answers in _chunks(frame.loc[named, column]):
            files = [read_bytes(answer) for answer in answers]
            frame.loc[answers.index, column] = texts_of(
                tokenise.images, files, tokenise.tokenizer.name_or_path
            )
    return frame


def _chunks(answers: pd.Series) -> Iterator[pd.Series]:
    for start in range(0, len(answers), _ENCODED_AT_ONCE):
        yield answers.iloc[start : start + _ENCODED_AT_ONCE]


def _labels(kept: pd.DataFrame, subject: str) -> dict[str, int]:
    """How many training rows there are of each label, or how many pairs say how sure theirs is."""
    train = kept[kept["split"] == "train"]
    if subject == "pairs":
        return {"with_agreement": int(train["agreement"].notna().sum())}
    if subject == "prompts":
        return {}
    label = train["label"]
    return {"desirable": int(label.sum()), "undesirable": int((~label).sum())}
