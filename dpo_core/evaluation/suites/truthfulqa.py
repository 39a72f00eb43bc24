"""TruthfulQA by lm-eval: true against false answers, by likelihood and in generated text.

Source: Lin et al. 2022, arXiv 2109.07958, The first edition has 817 questions, the authors' newer one 790.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_core.errors import StageFailed
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import Item, MeasureSpec, Outcome
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.lm_eval_tasks import check, run_tasks
from dpo_core.evaluation.suites.rows import Row, read_fields, sample_rows

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

_CHECK_MODEL = (
    "Check that the model's files are complete and unchanged; if they are, set settings.precision to fp32"
)
_FIELDS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")


def read(path: Path) -> list[Row]:
    """Questions of TruthfulQA.csv with the fields of lm-eval's tasks.

    `mc1_targets` holds the best answer against the incorrect ones, as first defined; `mc2_targets` all.

    Raises:
        DataError: a row lacks a field.
    """
    rows = []
    for number, row in enumerate(read_fields(path, _FIELDS)):
        best = row["Best Answer"].strip()
        correct, incorrect = _answers(row["Correct Answers"]), _answers(row["Incorrect Answers"])
        rows.append(
            {
                "id": str(number),
                "type": row.get("Type") or "",
                "question": row["Question"].strip(),
                "best_answer": best,
                "correct_answers": correct,
                "incorrect_answers": incorrect,
                "mc1_targets": {"choices": [best, *incorrect], "labels": [1] + [0] * len(incorrect)},
                "mc2_targets": {
                    "choices": [*correct, *incorrect],
                    "labels": [1] * len(correct) + [0] * len(incorrect),
                },
            }
        )
    return rows


def _answers(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split("; ") if part.strip()))


def mc2(doc: Row, results: Sequence[tuple[float, bool]], model: str = "the model") -> dict[str, float]:
    """Share of the true answers in the total probability, from summed log-probs.

    lm-eval's `process_results_mc2` takes exp of the sums, which is 0 for long answers: 0/0. Here the largest
    sum is subtracted first, which does not change the share.

    Args:
        model: its name in errors.

    Raises:
        StageFailed: a log-prob is not a finite number.
    """
    logps = np.array([logp for logp, _ in results], np.float64)
    if not np.isfinite(logps).all():
        raise StageFailed(
            f"{model} gives an answer to the question {doc['question'][:60]!r} the log-prob {logps.min()}",
            _CHECK_MODEL,
        )
    p = np.exp(logps - logps.max())
    return {"acc": float(p[np.array(doc["mc2_targets"]["labels"]) == 1].sum() / p.sum())}


MC = [
    MeasureSpec(name="mc1", label="MC1: the best answer is likelier than every false one"),
    MeasureSpec(name="mc2", label="MC2: probability of the true answers among all"),
]


def run_mc(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """lm-eval's `truthfulqa_mc1` and `truthfulqa_mc2`: six example questions, then each answer's log-prob."""
    sampled = sample_rows(rows, config.limit, config.seed)
    names = ["truthfulqa_mc1", "truthfulqa_mc2"]

    def process_results(doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        return mc2(doc, results, subject.name)

    samples, settings, facts = run_tasks(
        subject,
        "truthfulqa",
        names,
        {"validation": sampled},
        config,
        truthfulqa_mc2={"process_results": process_results},
    )
    by_mc1, by_mc2 = ({s["doc_id"]: s for s in samples[name]} for name in names)
    items = []
    for place, row in enumerate(sampled):
        logps = [logp for logp, _ in by_mc1[place]["filtered_resps"]]
        likeliest = row["mc1_targets"]["choices"][int(np.argmax(logps))]
        values = {"mc1": float(by_mc1[place]["acc"]), "mc2": float(by_mc2[place]["acc"])}
        items.append(_item(subject, row, likeliest, values, subset=row["type"]))
    settings |= _facts_of(rows) | {"mc1": "best answer against incorrect ones"}
    return Outcome(items=items, specs=MC, facts=facts, settings=settings)


def _similarity_specs() -> list[MeasureSpec]:
    specs = []
    scores = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    for name, label in scores.items():
        specs += [
            MeasureSpec(name=f"{name}_acc", label=f"nearer to a true reference by {label}"),
            MeasureSpec(name=f"{name}_max", label=f"{label} to the nearest true reference", kind="mean"),
            MeasureSpec(name=f"{name}_diff", label=f"{label}: nearest true - nearest false", kind="mean"),
        ]
    return specs


GEN = _similarity_specs()


def run_gen(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """lm-eval's `truthfulqa_gen`: a greedy answer, compared with the references by BLEU and ROUGE."""
    sampled = sample_rows(rows, config.limit, config.seed)
    names = ["truthfulqa_gen"]
    with _one_resample():
        samples, settings, facts = run_tasks(subject, "truthfulqa", names, {"validation": sampled}, config)
    logged = {s["doc_id"]: s for s in samples["truthfulqa_gen"]}
    items = []
    for place, row in enumerate(sampled):
        sample = logged[place]
        values = {spec.name: float(sample[spec.name]) for spec in GEN}
        items.append(_item(subject, row, sample["resps"][0][0], values))
    settings |= _facts_of(rows)
    return Outcome(items=items, specs=GEN, facts=facts, settings=settings)


@contextmanager
def _one_resample() -> Iterator[None]:
    """Skip ROUGE's bootstrap: lm-eval does not read its interval.

    It resamples the single score of an answer a thousand times, which takes half a second per question.
    """
    try:
        from rouge_score import scoring  # noqa: PLC0415 - optional
    except ImportError:  # part of lm-eval, whose absence `check` reports
        yield
        return
    original = scoring.BootstrapAggregator
    scoring.BootstrapAggregator = partial(original, n_samples=1)
    try:
        yield
    finally:
        scoring.BootstrapAggregator = original


def _facts_of(rows: list[Row]) -> dict[str, str]:
    return {
        "shots": "6 examples in the prompt, the same for every question",
        "edition": f"TruthfulQA.csv of {len(rows)} questions; no full stop added to the answers scored",
    }


def _item(
    subject: "ModelUnderTest", row: Row, answer: str, values: dict[str, float], *, subset: str = ""
) -> Item:
    for name, value in values.items():
        if not math.isfinite(value):
            raise StageFailed(
                f"{name} of {subject.name} is {value} for the question {row['question'][:60]!r}", _CHECK_MODEL
            )
    return Item(
        id=row["id"],
        cluster=row["id"],
        subset=subset,
        prompt=row["question"],
        answer=answer,
        values=values,
    )


_FILES = ("TruthfulQA.csv", "TruthfulQA.csv.gz")
_SOURCE = "github.com/sylinrl/TruthfulQA"
SUITES = [
    Suite(
        name="truthfulqa_mc",
        title="TruthfulQA MC",
        about="True against false answers by likelihood (MC1, MC2)",
        files=_FILES,
        source=_SOURCE,
        run=run_mc,
        read=read,
        check=check,
    ),
    Suite(
        name="truthfulqa_gen",
        title="TruthfulQA text",
        about="Written answers against true and false references (BLEU, ROUGE)",
        files=_FILES,
        source=_SOURCE,
        run=run_gen,
        read=read,
        check=check,
    ),
]
