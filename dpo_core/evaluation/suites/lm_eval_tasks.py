"""Runs tasks of EleutherAI's lm-eval on local data files.

Prompts, shots, filters and metrics are those of the library's tasks; only the data set is replaced, and
multiple choice is scored by the engine of `dpo_core.evaluation.lm_eval_model`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.suites.chat_or_text import wants_chat
from dpo_core.evaluation.suites.rows import Row

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

_ANSWER_BATCH = 16  # most prompts answered at once: with their shots they are long


class TaskResults(NamedTuple):
    """Results of lm-eval."""

    samples: dict[str, list[Row]]
    """By task: one entry for every question and filter."""
    settings: dict[str, Any]
    facts: dict[str, Any]


def run_tasks(
    subject: "ModelUnderTest",
    family: str,
    names: Sequence[str],
    splits: dict[str, list[Row]],
    config: SuiteConfig,
    **overrides: dict[str, Any],
) -> TaskResults:
    """Run tasks of lm-eval on a model.

    Args:
        family, names, splits, overrides: see `load_tasks`.

    Raises:
        RecipeError: lm-eval is not installed.
    """
    check(config)
    with _quiet():
        from dpo_core.evaluation.lm_eval_model import HarnessLM  # noqa: PLC0415 - optional

        tasks = load_tasks(family, names, splits, **overrides)
        chat = wants_chat(subject, config)
        settings: dict[str, Any] = {
            "library": f"lm-eval {version('lm-eval')}",
            "tasks": {name: task.VERSION for name, task in tasks.items()},
            "shots": tasks[names[0]].config.num_fewshot,
            "chat_template": chat,
            "precision": config.precision,
        }
        longest = config.sampling.max_new_tokens
        for task in tasks.values():
            if task.OUTPUT_TYPE == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": longest}, update=True)
                settings |= {"decoding": "greedy", "max_new_tokens": longest}
        lm = HarnessLM(
            subject,
            precision=config.precision,
            token_budget=config.token_budget,
            batch_size=min(config.sampling.batch_size, _ANSWER_BATCH),
        )
        samples = evaluate_tasks(lm, tasks, chat=chat)
    return TaskResults(samples, settings, {"prompts_cut_to_the_context": lm.cut})


def load_tasks(
    family: str, names: Sequence[str], splits: dict[str, list[Row]], **overrides: dict[str, Any]
) -> dict[str, Any]:
    """Tasks of lm-eval by name, with `splits` as their data instead of the hub.

    Args:
        family: the folder of the library's tasks.
        splits: rows by split, with the fields of the hub's data set.
        overrides: fields of the task definition, by task name.
    """
    import lm_eval  # noqa: PLC0415 - optional
    from datasets import Dataset  # noqa: PLC0415 - takes seconds
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - optional

    folder = Path(lm_eval.__file__).parent / "tasks" / family
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    data = {split: Dataset.from_list(rows) for split, rows in splits.items() if rows}
    # As members of a group, tasks keep the fields of their definition that are not overridden.
    members = [{"task": n, "custom_dataset": lambda **_: data, **overrides.get(n, {})} for n in names]
    tasks: dict[str, Any] = manager.load([{"group": "local", "task": members}])["tasks"]
    return tasks


def evaluate_tasks(lm: Any, tasks: dict[str, Any], *, chat: bool) -> dict[str, list[Row]]:
    """Evaluate tasks on an lm-eval model; see `TaskResults.samples`."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED  # noqa: PLC0415 - optional
    from lm_eval.evaluator import evaluate  # noqa: PLC0415 - optional

    for task in tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the library's default, so that its shots are used
    results = evaluate(
        lm=lm,
        task_dict={"tasks": tasks, "groups": {}},
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
    )
    assert results is not None, "one process evaluates"
    samples: dict[str, list[Row]] = results["samples"]
    return samples


def check(config: SuiteConfig) -> None:
    """Check that lm-eval is installed.

    Raises:
        RecipeError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(
            "this suite needs EleutherAI's lm-eval, which is not installed",
            "Run: .venv/bin/pip install -c constraints.txt -e '.[eval]'",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's messages and progress bars out of the terminal; settings and facts hold what matters."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    logging.captureWarnings(True)  # into the log of the job
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.captureWarnings(False)
        logger.setLevel(level)
