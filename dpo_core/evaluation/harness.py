"""GSM8K and TruthfulQA by EleutherAI's lm-eval (Gao et al.), asked from local files.

Prompts, shots, filters and metrics are the library's own task definitions; only the data set is replaced.
Sources: Cobbe et al. 2021 (arXiv 2110.14168), Lin et al. 2022 (2109.07958).
"""

import logging
import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dpo_core.errors import DataError, ModelError, RecipeError, StageFailed
from dpo_core.evaluation.results import Item, MeasureSpec, Outcome
from dpo_core.evaluation.rows import Progress, Row, read_fields, some
from dpo_core.evaluation.subject import Subject
from dpo_core.evaluation.suites import Suite, SuiteConfig
from dpo_core.models import digest_file

_ANSWER_BATCH = 16  # prompts with their shots answered at once, at most: they are long
_NO_ANSWER = "[invalid]"  # what lm-eval's filters give where they find nothing

Splits = dict[str, list[Row]]


def load_tasks(family: str, names: Seq[str], splits: Splits, **overrides: Any) -> dict[str, Any]:
    """Tasks of lm-eval by name, asking from `splits` in place of the hub.

    Args:
        family: the folder of the library's tasks.
        overrides: fields of the definition, by the name of the task.
    """
    import lm_eval
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / family
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    data = {split: Dataset.from_list(rows) for split, rows in splits.items() if rows}
    # As members of a group, tasks keep whatever of their definition is not given anew.
    members = [{"task": n, "custom_dataset": lambda **_: data, **overrides.get(n, {})} for n in names]
    tasks: dict[str, Any] = manager.load([{"group": "local", "task": members}])["tasks"]
    return tasks


def ask(lm: Any, tasks: dict[str, Any], *, chat: bool) -> dict[str, list[Row]]:
    """lm-eval's log of every question of every task, one entry for each of the task's filters."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the library's own, so that its shots are drawn
    found = evaluate(
        lm=lm,
        task_dict={"tasks": tasks, "groups": {}},
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
    )
    assert found is not None, "one process evaluates"
    samples: dict[str, list[Row]] = found["samples"]
    return samples


def wants_chat(subject: Subject, config: SuiteConfig) -> bool:
    """Whether questions are put as a user's turn.

    Raises:
        ModelError: they must be, and the tokenizer has no chat template.
    """
    has_template = bool(subject.tokenizer.chat_template)
    if config.chat == "always" and not has_template:
        raise ModelError(
            f"the tokenizer of {subject.name} has no chat template, and chat is set to always",
            "Set chat to auto or never",
        )
    return has_template and config.chat != "never"


def _run(
    subject: Subject, tasks: dict[str, Any], config: SuiteConfig, progress: Progress
) -> tuple[dict[str, list[Row]], dict[str, Any], dict[str, Any]]:
    """Samples by task, settings, facts."""
    from dpo_core.evaluation.harness_lm import HarnessLM

    chat = wants_chat(subject, config)
    settings: dict[str, Any] = {
        "library": f"lm-eval {version('lm-eval')}",
        "tasks": {name: task.VERSION for name, task in tasks.items()},
        "shots": next(iter(tasks.values())).config.num_fewshot,
        "chat_template": chat,
        "precision": config.precision,
    }
    if any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values()):
        longest = config.sampling.max_new_tokens
        settings |= {"decoding": "greedy", "max_new_tokens": longest}
        for task in tasks.values():
            task.set_config(key="generation_kwargs", value={"max_gen_toks": longest}, update=True)
    lm = HarnessLM(
        subject,
        precision=config.precision,
        token_budget=config.token_budget,
        batch_size=min(config.sampling.batch_size, _ANSWER_BATCH),
        progress=progress,
    )
    samples = ask(lm, tasks, chat=chat)
    return samples, settings, {"prompts_cut_to_the_context": lm.cut}


@contextmanager
def lm_eval_quiet() -> Iterator[None]:
    """Keep lm-eval's advice and bars out of the terminal; what matters of it stands in settings and facts.

    Raises:
        RecipeError: lm-eval is not installed.
    """
    try:
        import lm_eval.api.task
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError as error:
        raise RecipeError(
            f"this suite needs EleutherAI's lm-eval, which cannot be imported ({error})",
            "Run: pip install 'lm-eval>=0.4.13,<0.5'",
        ) from error
    task, logger = lm_eval.api.task, logging.getLogger("lm_eval")
    bar, level, shown = task.tqdm, logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        if shown:
            enable_progress_bars()


# GSM8K


def read_gsm8k(path: Path) -> list[Row]:
    """Questions of a GSM8K file; each row names the file of training questions beside it, or "".

    Raises:
        DataError: a row lacks a field, or its answer does not end in `#### number`.
    """
    rows = read_fields(path, ("question", "answer"))
    for number, row in enumerate(rows, 1):
        if "####" not in row["answer"]:
            raise DataError(f"the answer of row {number} of {path} has no '#### number'", "Restore the file")
    train = path.with_name(path.name.replace("test", "train"))
    shots_from = str(train) if train != path and train.is_file() else ""
    return [row | {"id": str(i), "shots_from": shots_from} for i, row in enumerate(rows)]


GSM8K = [
    MeasureSpec(name="strict", label="exact match of the number after ####"),
    MeasureSpec(name="flexible", label="exact match of the last number"),
    MeasureSpec(name="no_format", label="answers without #### number", better="lower"),
]


def run_gsm8k(subject: Subject, rows: list[Row], config: SuiteConfig, progress: Progress) -> Outcome:
    """lm-eval's `gsm8k`, five shots drawn from the training questions for every question.

    Without a file of training questions its `gsm8k_cot`, which brings eight shots of its own and asks for
    "The answer is N" in place of "#### N".
    """
    asked = some(rows, config.limit, config.seed)
    train, source = _shots(asked)
    name = "gsm8k" if train else "gsm8k_cot"
    with lm_eval_quiet():
        tasks = load_tasks("gsm8k", [name], {"test": _questions(asked), "train": train})
        samples, settings, facts = _run(subject, tasks, config, progress)
    settings["shots_from"] = source
    logged = {(s["filter"], s["doc_id"]): s for s in samples[name]}
    items = []
    for place, row in enumerate(asked):
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
    return Outcome(items=items, specs=GSM8K, facts=facts, settings=settings)


def _shots(asked: list[Row]) -> tuple[list[Row], str | dict[str, Any]]:
    """Training questions without those that are asked, and what the settings say of them."""
    if not asked[0]["shots_from"]:
        return [], "the fixed shots of gsm8k_cot: no file of training questions beside the test file"
    path = Path(asked[0]["shots_from"])
    questions = {row["question"] for row in asked}
    train = [r for r in _questions(read_gsm8k(path)) if r["question"] not in questions]
    return train, {"file": path.name, "sha256": digest_file(path), "rows": len(train)}


def _questions(rows: list[Row]) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


# TruthfulQA

_EDITION = "TruthfulQA.csv, answers as in the file, with no full stop added"
_TRUTHFUL_FIELDS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")


def read_truthfulqa(path: Path) -> list[Row]:
    """Questions of TruthfulQA.csv with the fields that lm-eval's tasks read.

    `mc1_targets` holds the best answer against the incorrect ones, as first defined; `mc2_targets` all.

    Raises:
        DataError: a row lacks a field.
    """
    rows = []
    for number, row in enumerate(read_fields(path, _TRUTHFUL_FIELDS)):
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


def mc2(doc: Row, results: Seq[tuple[float, bool]]) -> dict[str, float]:
    """Share of the true answers in the probability of all, from their summed log-probs.

    lm-eval's `process_results_mc2` takes exp of the sums, which is 0 for long answers: 0/0. Here the largest
    is subtracted first, which changes nothing else.

    Raises:
        StageFailed: a log-prob is not a finite number.
    """
    logps = np.array([logp for logp, _ in results], np.float64)
    if not np.isfinite(logps).all():
        raise StageFailed(
            f"the model gives an answer to {doc['question'][:60]!r} the log-prob {logps.min()}",
            "Check its weights, or set precision to fp32",
        )
    p = np.exp(logps - logps.max())
    return {"acc": float(p[np.array(doc["mc2_targets"]["labels"]) == 1].sum() / p.sum())}


TRUTHFULQA_MC = [
    MeasureSpec(name="mc1", label="MC1: the best answer is likelier than every false one"),
    MeasureSpec(name="mc2", label="MC2: probability of the true answers among all"),
]


def run_truthfulqa_mc(subject: Subject, rows: list[Row], config: SuiteConfig, progress: Progress) -> Outcome:
    """lm-eval's `truthfulqa_mc1` and `truthfulqa_mc2`: six example questions, then each answer's log-prob."""
    asked = some(rows, config.limit, config.seed)
    with lm_eval_quiet():
        tasks = load_tasks(
            "truthfulqa",
            ["truthfulqa_mc1", "truthfulqa_mc2"],
            {"validation": asked},
            truthfulqa_mc2={"process_results": mc2},
        )
        samples, settings, facts = _run(subject, tasks, config, progress)
    one, two = ({s["doc_id"]: s for s in samples[name]} for name in ("truthfulqa_mc1", "truthfulqa_mc2"))
    items = []
    for place, row in enumerate(asked):
        logps = [logp for logp, _ in one[place]["filtered_resps"]]
        likeliest = row["mc1_targets"]["choices"][int(np.argmax(logps))]
        items.append(
            _truthful_item(
                row, likeliest, {"mc1": float(one[place]["acc"]), "mc2": float(two[place]["acc"])}
            ).model_copy(update={"subset": row["type"]})
        )
    settings |= {"edition": f"{_EDITION}: {len(rows)} questions", "mc1": "best answer against incorrect ones"}
    return Outcome(items=items, specs=TRUTHFULQA_MC, facts=facts, settings=settings)


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


TRUTHFULQA_GEN = _similarity_specs()


def run_truthfulqa_gen(subject: Subject, rows: list[Row], config: SuiteConfig, progress: Progress) -> Outcome:
    """lm-eval's `truthfulqa_gen`: a greedy answer, compared with the references by BLEU and ROUGE."""
    asked = some(rows, config.limit, config.seed)
    with lm_eval_quiet():
        tasks = load_tasks("truthfulqa", ["truthfulqa_gen"], {"validation": asked})
        samples, settings, facts = _run(subject, tasks, config, progress)
    logged = {s["doc_id"]: s for s in samples["truthfulqa_gen"]}
    items = []
    for place, row in enumerate(asked):
        sample = logged[place]
        values = {spec.name: float(sample[spec.name]) for spec in TRUTHFULQA_GEN}
        items.append(_truthful_item(row, sample["resps"][0][0], values))
    settings["edition"] = f"{_EDITION}: {len(rows)} questions"
    return Outcome(items=items, specs=TRUTHFULQA_GEN, facts=facts, settings=settings)


def _truthful_item(row: Row, answer: str, values: dict[str, float]) -> Item:
    if not all(map(math.isfinite, values.values())):
        raise StageFailed(f"question {row['id']} has a value that is no number: {values}", "Check the model")
    return Item(id=row["id"], cluster=row["id"], prompt=row["question"], answer=answer, values=values)


_TRUTHFUL_FILES = ("TruthfulQA.csv", "TruthfulQA.csv.gz")
_TRUTHFUL_SOURCE = "github.com/sylinrl/TruthfulQA"

SUITES = [
    Suite(
        name="gsm8k",
        title="GSM8K: grade-school mathematics, exact match of the result",
        files=("gsm8k_test.jsonl", "gsm8k_test.jsonl.gz"),
        source="github.com/openai/grade-school-math (test.jsonl; train.jsonl as gsm8k_train.jsonl for shots)",
        run=run_gsm8k,
        read=read_gsm8k,
    ),
    Suite(
        name="truthfulqa_mc",
        title="TruthfulQA: true against false answers by likelihood (MC1, MC2)",
        files=_TRUTHFUL_FILES,
        source=_TRUTHFUL_SOURCE,
        run=run_truthfulqa_mc,
        read=read_truthfulqa,
    ),
    Suite(
        name="truthfulqa_gen",
        title="TruthfulQA: written answers against true and false references (BLEU, ROUGE)",
        files=_TRUTHFUL_FILES,
        source=_TRUTHFUL_SOURCE,
        run=run_truthfulqa_gen,
        read=read_truthfulqa,
    ),
]
