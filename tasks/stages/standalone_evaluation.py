"""Evaluate checkpoints outside a run: suites, and a win rate of two models on the same prompts."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from pydantic import Field, model_validator
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from deploy.launchers import Cluster
from dpo_core.config import Config
from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.tokens.chat_template import template_in
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import ModelError, RecipeError
from dpo_core.evaluation.compare import Comparison, compare
from dpo_core.evaluation.config import SuiteConfig, SuitesConfig
from dpo_core.evaluation.contamination import TrainingText, training_texts
from dpo_core.evaluation.prompt import Prompt
from dpo_core.evaluation.results import Item, SuiteResult
from dpo_core.evaluation.run_suite import mark_contaminated, suite_files
from dpo_core.evaluation.suites.registry import find
from dpo_core.generation.config import SamplingConfig
from dpo_core.jobs.files import InferenceConfig, NamedModel
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import AnswerPairs, compare_answers
from dpo_core.judging.results import WinRate
from dpo_core.models.remote_code import trust
from dpo_core.models.source import weights_digest
from dpo_core.rewards.functions import check_reward
from dpo_core.system import write_atomic
from tasks.provenance import command_line, hardware
from tasks.recipe.policies import is_external
from tasks.reports.evaluation_report import EvaluatedModel, EvaluationReport, evaluation_document
from tasks.reports.html import html
from tasks.reports.run_report import Sample
from tasks.stages.assess import suite_row
from tasks.stages.evaluation import readable, turns_of
from tasks.stages.judging import answers_of, chosen_prompts, rewards_of
from tasks.stages.model_jobs import CommandJobs, asked_model
from tasks.stages.suite_results import (
    SuiteRequest,
    checkpoint_of,
    objective_of,
    suite_results,
    trained_rows,
)
from tasks.store.files import REPLIES, SUITE_RESULTS, disk_errors

log = logging.getLogger("dpo")

SHOWN = 8
"""Prompts whose answers the page shows; all answers are in `answers.json` beside it."""


class EvaluationRequest(Config):
    """Settings of `dpo evaluate` and `dpo compare`."""

    suites: list[str] = Field(default_factory=list)
    """Names of suites."""
    data: str = "."
    """Folder of the suites' files."""
    settings: SuiteConfig = SuiteConfig()
    """How suites are run."""
    reference: str | None = None
    """The models' reference, for implicit rewards."""
    train: DataConfig | None = None
    """Training data of the models, to find evaluation items in it."""
    tokens: TokenConfig = TokenConfig(max_length=2048, max_prompt_length=1536)
    """Maximum lengths in tokens."""
    prompts: DataConfig | None = None
    """Prompts that both models answer, for a win rate."""
    most_prompts: int = Field(64, ge=2)
    """Maximum number of these prompts; a seeded choice."""
    answers: SamplingConfig = SamplingConfig(max_new_tokens=128)
    """Sampling of the answers."""
    trust_remote_code: bool = False
    """Run Python code that ships with the models."""
    judge: JudgeConfig = JudgeConfig()
    """What decides which answer is better."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of prompts, the answers and the intervals."""
    ranks: InferenceConfig = InferenceConfig()
    """Processes that share the work."""

    @model_validator(mode="after")
    def _what_is_set_is_read(self) -> "EvaluationRequest":
        if self.prompts is None and (self.judge != JudgeConfig() or self.answers != _ANSWERS):
            raise ValueError(
                "judge.* and answers.* have no effect, because no prompts are given. Add --prompts, or "
                "remove them"
            )
        return self


_ANSWERS = SamplingConfig(max_new_tokens=128)


def evaluate_models(
    models: Sequence[str], request: EvaluationRequest, workspace: Path, cluster: Cluster | None = None
) -> tuple[EvaluationReport, Path]:
    """Evaluate every model, and compare the two if there are two; returns the report and its page's path.

    Args:
        cluster: where the jobs run; None: on this machine.

    Raises:
        RecipeError: a suite, its file or a model does not exist, or the request is empty.
    """
    started = time.monotonic()
    if len(set(models)) < len(models):
        raise RecipeError(f"{models[0]} would be compared with itself", "Name two models")
    if not request.suites and (request.prompts is None or len(models) < 2):
        raise RecipeError(
            "there is nothing to evaluate", "Name suites with --suite, or prompts with --prompts"
        )
    files = _files(request)
    if len(models) == 2 and request.prompts is not None and request.judge.kind == "reward":
        check_reward(request.judge.source)
    if cluster is not None:
        cluster.check(workspace)
    jobs = CommandJobs(workspace, request.ranks, terminal_bar, cluster)
    with closing(jobs.server):
        asked_models = _models(models, request, jobs)
        request = _same_chat(request, asked_models)
        prompts = _prompts(request, asked_models)  # before the suites, which may take hours
        training = _training(request.train, [trained_rows(spec, workspace) for spec in models])
        results = _suites(request, files, asked_models, training, jobs) if files else []
        comparisons: list[Comparison] = []
        win_rates: list[WinRate] = []
        samples: list[Sample] = []
        if len(asked_models) == 2:
            if files:
                ours, theirs = (results[: len(files)], results[len(files) :])
                comparisons = [compare(ours, theirs, seed=request.seed)]
            if prompts:
                rate, samples = _win_rate(request, prompts, asked_models, training, jobs)
                win_rates = [rate]
    report = EvaluationReport(
        models=[
            EvaluatedModel(
                name=model.name,
                sha256=weights_digest(Path(model.path)),
                objective=objective_of(spec, workspace),
            )
            for spec, model in zip(models, asked_models, strict=True)
        ],
        suites=[suite_row(result) for result in results],
        comparisons=comparisons,
        win_rates=win_rates,
        samples=samples[:SHOWN],
        command=command_line(),
        finished_at=datetime.now(UTC),
        hardware=hardware(),
        seconds=time.monotonic() - started,
    )
    return report, _write(report, results, samples, workspace)


def _files(request: EvaluationRequest) -> dict[str, Path]:
    for name in request.suites:
        find(name)
    if not request.suites:
        return {}
    return suite_files(SuitesConfig(names=request.suites, data=request.data, settings=request.settings))


def _models(specs: Sequence[str], request: EvaluationRequest, jobs: CommandJobs) -> list[NamedModel]:
    models = [
        asked_model(name, _checkpoint(spec, request, jobs), request.tokens)
        for spec, name in zip(specs, labels(specs), strict=True)
    ]
    if len({Path(model.path).resolve() for model in models}) < len(models):
        raise RecipeError(f"{specs[0]} and {specs[1]} are the same model", "Name two models")
    return models


def _checkpoint(spec: str, request: EvaluationRequest, jobs: CommandJobs) -> Path:
    folder = checkpoint_of(spec, jobs.workspace, jobs.named("convert-model", f"converting {spec}"))
    if request.trust_remote_code:
        trust(folder)
    return folder


def labels(models: Sequence[str]) -> list[str]:
    """Short names for tables: the last part of each path if these differ, else the whole paths."""
    short = [spec if is_external(spec) else Path(spec).name for spec in models]
    return short if len(set(short)) == len(short) else list(models)


def _same_chat(request: EvaluationRequest, models: Sequence[NamedModel]) -> EvaluationRequest:
    """The request without chat if only one of two models has a chat template."""
    without = [model.name for model in models if not template_in(Path(model.path))]
    if request.settings.chat != "auto" or not 0 < len(without) < len(models):
        return request
    log.info("%s has no chat template: both models are prompted without one", without[0])
    settings = request.settings.model_copy(update={"chat": "never"})
    return request.model_copy(update={"settings": settings})


def _training(config: DataConfig | None, runs: Sequence[Path | None]) -> TrainingText | None:
    """The models' training texts: from the named data, else from the runs that trained them."""
    if config is not None:
        frames = [load(config).frame]
    else:
        frames = [pd.read_parquet(table) for table in dict.fromkeys(runs) if table]
        frames = [frame[frame["split"] == "train"] for frame in frames]
    if not frames:
        return None
    sound = (frame[frame["fault"] == ""] if "fault" in frame else frame for frame in frames)
    return TrainingText(text for frame in sound for text in training_texts(frame))


def _warn_of_contamination(prompts: Sequence[Prompt], training: TrainingText | None) -> None:
    """Warn if prompts occur in the training data: the models may have memorised the answers."""
    if training is None:
        return
    questions = [json.loads(p.prompt)[-1]["content"] if p.chat else p.prompt for p in prompts]
    named = ((str(number), str(text)) for number, text in enumerate(questions))
    contaminated = training.find(Item(id=name, cluster=name, prompt=text, values={}) for name, text in named)
    if contaminated:
        log.warning(
            "%d of %d prompts are in the models' training data: a win rate on them says little about new "
            "prompts",
            len(contaminated),
            len(prompts),
        )


def _suites(
    request: EvaluationRequest,
    files: dict[str, Path],
    models: Sequence[NamedModel],
    training: TrainingText | None,
    jobs: CommandJobs,
) -> list[SuiteResult]:
    """The results of every model on every suite, model by model."""
    reference = None
    if request.reference is not None:
        folder = _checkpoint(request.reference, request, jobs)
        reference = asked_model(request.reference, folder, request.tokens)
    paths = {name: file.absolute() for name, file in files.items()}
    suites = SuiteRequest(models, paths, request.settings, reference)
    results, cached = suite_results(suites, jobs.workspace, jobs.named("suites", ", ".join(files)))
    for (model, name), result in results.items():
        state = "cached" if (model, name) in cached else f"{result.seconds:.1f} s"
        log.info("%s, %s: %s", name, model, state)
    if training is None:
        return list(results.values())
    return [mark_contaminated(result, training) for result in results.values()]


def _prompts(request: EvaluationRequest, models: Sequence[NamedModel]) -> list[Prompt]:
    """The prompts that both models answer; empty if none are given or there is only one model.

    Raises:
        ModelError: a prompt is a conversation, and a model has no chat template to write it with.
        RecipeError: the file has fewer than two usable prompts.
    """
    if request.prompts is None or len(models) < 2:
        return []
    prompts = chosen_prompts(request.prompts, request.most_prompts, request.seed)
    form = request.tokens.template
    if form == "chat" or (form == "auto" and any(prompt.chat for prompt in prompts)):
        for model in models:
            if not template_in(Path(model.path)):
                raise ModelError(
                    f"{request.prompts.path} has conversations, but {model.name} has no chat template",
                    "Set tokens.template to transcript, or give prompts as text",
                )
    return prompts


def _win_rate(
    request: EvaluationRequest,
    prompts: Sequence[Prompt],
    models: Sequence[NamedModel],
    training: TrainingText | None,
    jobs: CommandJobs,
) -> tuple[WinRate, list[Sample]]:
    """The win rate of the first model over the second, and the answers of both to every prompt."""
    judge, seed = request.judge, request.seed
    _warn_of_contamination(prompts, training)
    answers = answers_of(models, prompts, request.answers, seed, jobs.named("answers", "answers"))
    a, b = (model.name for model in models)
    chat = [prompt.chat for prompt in prompts]
    pairs = AnswerPairs(a, b, [prompt.prompt for prompt in prompts], answers[a], answers[b], chat)
    rewards = None
    if judge.kind == "reward_model":
        rewards = rewards_of(judge.source, pairs, models[0].tokens, jobs.named("score", judge.name))
    with terminal_bar(judge.name) as show:
        cache = jobs.workspace / REPLIES
        rate = compare_answers(judge, pairs, rewards=rewards, cache=cache, seed=seed, progress=show)
    samples = [
        Sample(
            prompt=readable(prompt.prompt),
            turns=turns_of(prompt.prompt),
            completions={a: ours, b: theirs},
        )
        for prompt, ours, theirs in zip(prompts, answers[a], answers[b], strict=True)
    ]
    return rate, samples


def _write(
    report: EvaluationReport, results: list[SuiteResult], samples: list[Sample], workspace: Path
) -> Path:
    """Write page, report, all items and all answers into a new folder; returns the page's path."""
    folder = workspace / SUITE_RESULTS / f"evaluation-{report.finished_at:%Y%m%d-%H%M%S-%f}"
    with disk_errors(workspace, "writing the page of an evaluation"):
        folder.mkdir(parents=True)
        items = [result.model_dump(mode="json") for result in results]
        write_atomic(folder / "results.json", json.dumps(items, indent=1, ensure_ascii=False))
        if samples:
            answers = [sample.model_dump(mode="json") for sample in samples]
            write_atomic(folder / "answers.json", json.dumps(answers, indent=1, ensure_ascii=False))
        write_atomic(folder / "report.json", report.model_dump_json(indent=1))
        write_atomic(folder / "page.html", html(evaluation_document(report)))
    return folder / "page.html"


@contextmanager
def terminal_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields a function of the done and total units."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
