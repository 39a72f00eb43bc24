"""Evaluation of checkpoints outside a run: suites, and a win rate of two models on the same prompts."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import RecipeError
from dpo_core.evaluation.compare import Comparison, compare
from dpo_core.evaluation.config import SuiteConfig, SuitesConfig
from dpo_core.evaluation.contamination import TrainingText, training_texts
from dpo_core.evaluation.model_under_test import Asked, Subject
from dpo_core.evaluation.results import Item, SuiteResult
from dpo_core.evaluation.run_suite import suite_files, without_training_data
from dpo_core.evaluation.suites.registry import find
from dpo_core.generation.config import SamplingConfig
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.results import WinRate
from dpo_core.models.remote_code import trust
from dpo_core.rewards.functions import check_reward
from dpo_core.system import write_atomic
from tasks.provenance import command_line, hardware
from tasks.recipe.policies import elsewhere
from tasks.reports.evaluation_page import render_evaluation
from tasks.reports.evaluation_report import EvaluatedModel, EvaluationReport
from tasks.reports.run_report import Sample
from tasks.stages.assess import suite_row
from tasks.stages.judging import chosen_prompts, judge_models
from tasks.stages.suite_results import FOLDER, find_model, suite_result, trained_rows
from tasks.store.files import CACHE_FOLDER, disk_errors

log = logging.getLogger("dpo")

SHOWN = 8
"""Prompts whose answers stand on the page; all of them are kept beside it."""


class EvaluationRequest(Config):
    """What `dpo evaluate` and `dpo compare` are asked for."""

    suites: list[str] = Field(default_factory=list)
    """Names of suites."""
    data: str = "."
    """Folder of their files."""
    settings: SuiteConfig = SuiteConfig()
    """How suites are run."""
    reference: str | None = None
    """What the models were trained from."""
    train: DataConfig | None = None
    """What they were trained on, to look for evaluation items in it."""
    tokens: TokenConfig = TokenConfig(max_length=2048, max_prompt_length=1536)
    """How much of a text is read."""
    prompts: DataConfig | None = None
    """Prompts that both models answer, to be judged."""
    most_prompts: int = Field(64, ge=2)
    """Of these, at most; a seeded choice."""
    answers: SamplingConfig = SamplingConfig(max_new_tokens=128)
    """How the answers are drawn."""
    trust_remote_code: bool = False
    """Run Python code that ships with the models."""
    judge: JudgeConfig = JudgeConfig()
    """Who says which answer is better."""
    seed: int = Field(0, ge=0)
    """Of the choice of prompts, the answers and the intervals."""

    @model_validator(mode="after")
    def _what_is_set_is_read(self) -> "EvaluationRequest":
        if self.prompts is None and (self.judge != JudgeConfig() or self.answers != _ANSWERS):
            raise ValueError("judge.* and answers.* would not be read: no prompts are given (--prompts)")
        return self


_ANSWERS = SamplingConfig(max_new_tokens=128)


def evaluate_models(
    models: Sequence[str], request: EvaluationRequest, workspace: Path
) -> tuple[EvaluationReport, Path]:
    """Ask every model, compare the first with the second where there are two; the report and its page.

    Raises:
        RecipeError: a suite, its file or a model is not there, or nothing was asked for.
    """
    started = time.monotonic()
    if len(set(models)) < len(models):
        raise RecipeError(f"{models[0]} would be compared with itself", "Name two models")
    if not request.suites and (request.prompts is None or len(models) < 2):
        raise RecipeError("nothing is asked for", "Name suites with --suite, or prompts with --prompts")
    files = _files(request)
    if len(models) == 2 and request.prompts is not None and request.judge.kind == "reward":
        check_reward(request.judge.source)
    subjects = _subjects(models, request, workspace)
    if len({subject.path.resolve() for subject in subjects}) < len(subjects):
        raise RecipeError(f"{models[0]} and {models[1]} are one model", "Name two models")
    request = _alike(request, subjects)
    training = _training(request.train, [trained_rows(spec, workspace) for spec in models])
    results = [
        [_one(workspace, name, file, subject, request, training) for name, file in files.items()]
        for subject in subjects
    ]
    comparisons: list[Comparison] = []
    win_rates: list[WinRate] = []
    samples: list[Sample] = []
    if len(subjects) == 2:
        if files:
            comparisons = [compare(results[0], results[1], seed=request.seed)]
        if request.prompts is not None:
            asked = chosen_prompts(request.prompts, request.most_prompts, request.seed)
            _warn_of_known(asked, training)
            with terminal_bar(f"answers, {request.judge.name}") as told:
                rate, samples = judge_models(
                    (subjects[0], subjects[1]),
                    asked,
                    request.answers,
                    request.judge,
                    workspace=workspace,
                    seed=request.seed,
                    progress=told,
                )
            win_rates = [rate]
    report = EvaluationReport(
        models=[EvaluatedModel(name=s.name, sha256=s.weights) for s in subjects],
        suites=[suite_row(result) for one in results for result in one],
        comparisons=comparisons,
        win_rates=win_rates,
        samples=samples[:SHOWN],
        command=command_line(),
        finished_at=datetime.now(UTC),
        hardware=hardware(),
        seconds=time.monotonic() - started,
    )
    return report, _keep(report, [result for one in results for result in one], samples, workspace)


def _files(request: EvaluationRequest) -> dict[str, Path]:
    for name in request.suites:
        find(name)
    if not request.suites:
        return {}
    return suite_files(SuitesConfig(names=request.suites, data=request.data, settings=request.settings))


def _subjects(models: Sequence[str], request: EvaluationRequest, workspace: Path) -> list[Subject]:
    reference = None
    if request.reference is not None:
        reference = Subject(_found(request.reference, request, workspace), request.reference, request.tokens)
    caches = workspace / CACHE_FOLDER
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subjects = [
        Subject(_found(spec, request, workspace), name, request.tokens, reference, caches, device)
        for spec, name in zip(models, labels(models), strict=True)
    ]
    for subject in subjects if reference else []:
        if reference and reference.tokenizer.get_vocab() != subject.tokenizer.get_vocab():
            raise RecipeError(
                f"the reference {reference.name} has another vocabulary than {subject.name}",
                "Name the model that this one was trained from, or leave --reference out",
            )
    return subjects


def _found(spec: str, request: EvaluationRequest, workspace: Path) -> Path:
    folder = find_model(spec, workspace)
    if request.trust_remote_code:
        trust(folder)
    return folder


def labels(models: Sequence[str]) -> list[str]:
    """Short names for tables: the last part of a path, where that tells the models apart."""
    short = [spec if elsewhere(spec) else Path(spec).name for spec in models]
    return short if len(set(short)) == len(short) else list(models)


def _alike(request: EvaluationRequest, subjects: Sequence[Subject]) -> EvaluationRequest:
    """Two models are asked in one way: in chat only where both have a template."""
    without = [subject.name for subject in subjects if not subject.tokenizer.chat_template]
    if request.settings.chat != "auto" or not 0 < len(without) < len(subjects):
        return request
    log.info("%s has no chat template: both are asked without one", without[0])
    settings = request.settings.model_copy(update={"chat": "never"})
    return request.model_copy(update={"settings": settings})


def _training(config: DataConfig | None, runs: Sequence[Path | None]) -> TrainingText | None:
    """What the models were trained on: the data that are named, else what the runs that made them kept."""
    if config is not None:
        frames = [load(config).frame]
    else:
        frames = [pd.read_parquet(table) for table in dict.fromkeys(runs) if table]
        frames = [frame[frame["split"] == "train"] for frame in frames]
    if not frames:
        return None
    sound = (frame[frame["fault"] == ""] if "fault" in frame else frame for frame in frames)
    return TrainingText(text for frame in sound for text in training_texts(frame))


def _warn_of_known(asked: Sequence[Asked], training: TrainingText | None) -> None:
    """Say how many of the prompts stand in the training data: an answer to them may be known by heart."""
    if training is None:
        return
    last = [json.loads(one.prompt)[-1]["content"] if one.chat else one.prompt for one in asked]
    named = ((str(number), str(text)) for number, text in enumerate(last))
    found = training.find(Item(id=name, cluster=name, prompt=text, values={}) for name, text in named)
    if found:
        log.warning(
            "%d of %d prompts stand in the data that the models were trained on: a win rate on these says "
            "little about new ones",
            len(found),
            len(asked),
        )


def _one(
    workspace: Path,
    name: str,
    file: Path,
    subject: Subject,
    request: EvaluationRequest,
    training: TrainingText | None,
) -> SuiteResult:
    with terminal_bar(f"{name}, {subject.name}") as told:
        result, cached = suite_result(workspace, find(name), subject, file, request.settings, told)
    log.info("%s, %s: %s", name, subject.name, "known from before" if cached else f"{result.seconds:.1f} s")
    return result if training is None else without_training_data(result, training)


def _keep(
    report: EvaluationReport, results: list[SuiteResult], samples: list[Sample], workspace: Path
) -> Path:
    """Page, report, every item and every answer to the prompts, in a folder of their own."""
    folder = workspace / FOLDER / f"evaluation-{report.finished_at:%Y%m%d-%H%M%S-%f}"
    with disk_errors(workspace, "writing the page of an evaluation"):
        folder.mkdir(parents=True)
        items = [result.model_dump(mode="json") for result in results]
        write_atomic(folder / "results.json", json.dumps(items, indent=1, ensure_ascii=False))
        if samples:
            answers = [sample.model_dump(mode="json") for sample in samples]
            write_atomic(folder / "answers.json", json.dumps(answers, indent=1, ensure_ascii=False))
        write_atomic(folder / "report.json", report.model_dump_json(indent=1))
        write_atomic(folder / "page.html", render_evaluation(report))
    return folder / "page.html"


@contextmanager
def terminal_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; it is told how many of how many units are done."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
