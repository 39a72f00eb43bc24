"""GSM8K by lm-eval: exact match of an answer's number.

Source: Cobbe et al. 2021, arXiv 2110.14168.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_core.errors import DataError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import Item, MeasureSpec, Outcome
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.lm_eval_tasks import check, run_tasks
from dpo_core.evaluation.suites.rows import Row, read_fields, sample_rows
from dpo_core.system import digest_file

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

_NO_ANSWER = "[invalid]"  # the result of lm-eval's filters if they find no answer


def read(path: Path) -> list[Row]:
    """Questions of a GSM8K file; each row names the file of training questions next to it, or "".

    Raises:
        DataError: a row lacks a field, or its answer does not end in `#### number`.
    """
    rows = read_fields(path, ("question", "answer"))
    for number, row in enumerate(rows, 1):
        if "####" not in row["answer"]:
            raise DataError(f"the answer of row {number} of {path} has no '#### number'", "Restore the file")
    shots_from = "".join(map(str, extra_files(path)))
    return [row | {"id": str(i), "shots_from": shots_from} for i, row in enumerate(rows)]


def extra_files(path: Path) -> list[Path]:
    """The file of training questions, if it lies next to the test questions under the same name."""
    train = path.with_name(path.name.replace("test", "train"))
    return [train] if train != path and train.is_file() else []


MEASURES = [
    MeasureSpec(name="strict", label="exact match of the result, written as in the shots"),
    MeasureSpec(name="flexible", label="exact match of the last number"),
    MeasureSpec(name="no_format", label="answers without a result written as in the shots", better="lower"),
]


def run(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """Run lm-eval's `gsm8k`, with five shots from the training questions for every question.

    Without a file of training questions run its `gsm8k_cot`, which has eight fixed shots and asks for
    "The answer is N" instead of "#### N".
    """
    rows = sample_rows(rows, config.limit, config.seed)
    train, source = shots(rows)
    name = "gsm8k" if train else "gsm8k_cot"
    splits = {"test": questions(rows), "train": train}
    samples, settings, facts = run_tasks(subject, "gsm8k", [name], splits, config)
    logged = {(s["filter"], s["doc_id"]): s for s in samples[name]}
    items = []
    for place, row in enumerate(rows):
        strict, flexible = logged["strict-match", place], logged["flexible-extract", place]
        values = {
            "strict": float(strict["exact_match"]),
            "flexible": float(flexible["exact_match"]),
            "no_format": float(strict["filtered_resps"][0] == _NO_ANSWER),
        }
        answer = strict["resps"][0][0]
        items.append(
            Item(id=row["id"], cluster=row["id"], prompt=row["question"], answer=answer, values=values)
        )
    return Outcome(items=items, specs=MEASURES, facts=facts, settings=settings | {"shots_from": source})


def shots(rows: list[Row]) -> tuple[list[Row], str | dict[str, Any]]:
    """Training questions without the tested ones, and their description for the settings."""
    if not rows[0]["shots_from"]:
        return [], "the fixed shots of gsm8k_cot: no file of training questions beside the test file"
    path = Path(rows[0]["shots_from"])
    tested = {row["question"] for row in rows}
    train = [row for row in questions(read(path)) if row["question"] not in tested]
    return train, {"file": path.name, "sha256": digest_file(path), "rows": len(train)}


def questions(rows: list[Row]) -> list[Row]:
    """The fields that lm-eval reads."""
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


SUITES = [
    Suite(
        name="gsm8k",
        title="GSM8K",
        about="Grade-school mathematics, exact match of the result",
        files=("gsm8k_test.jsonl", "gsm8k_test.jsonl.gz"),
        source="github.com/openai/grade-school-math (test.jsonl; train.jsonl as gsm8k_train.jsonl for shots)",
        run=run,
        read=read,
        extra_files=extra_files,
        check=check,
    ),
]
