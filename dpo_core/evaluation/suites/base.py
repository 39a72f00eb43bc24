"""What a suite is: what it measures, which file it reads, the function that runs it, and its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dpo_core.config import Config
from dpo_core.evaluation.model_under_test import Subject
from dpo_core.evaluation.results import Outcome
from dpo_core.generation.config import SamplingConfig
from dpo_core.scoring.precision import Precision


class SuiteConfig(Config):
    """How suites are run; a suite reads what it needs."""

    limit: int | None = Field(None, ge=1)
    """Items of each suite, at most: a seeded choice of whole prompts. Empty: all."""
    seed: int = 0
    """Of the sample of a suite's items, and of what is sampled from the model."""
    precision: Precision = "bf16"
    """Precision of log-probs."""
    token_budget: int = Field(4096, ge=64)
    """Tokens in one forward pass."""
    beta: float = Field(0.1, gt=0)
    """What the implicit reward multiplies the log-ratio by; its calibration depends on it, its order does
    not."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256, temperature=1.0)
    """How answers are drawn where a suite does not fix it."""
    samples: int = Field(1, ge=1)
    """Answers to each prompt, for refusals and pass@k."""
    run_code: bool = False
    """Whether code that the model wrote may be run, in a sandbox. HumanEval and MBPP need it."""
    classifier: str | None = None
    """What judges whether an answer is safe: a checkpoint folder with a classification head,
    `package.module:callable`, `file.py:callable` or the address of a server. It must not be a reward that the
    model was trained on."""
    safe_label: str | None = None
    """The classifier's label that means safe, where its names do not tell."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether questions are put as a user's turn: where the tokenizer has a chat template, always, never."""


Run = Callable[[Subject, list[dict[str, Any]], SuiteConfig, Callable[[int, int], None]], Outcome]
"""Subject, rows of the file, settings, and a function that is told how many of how many units are done."""


@dataclass(frozen=True)
class Suite:
    """One suite."""

    name: str
    title: str
    """Its name in tables."""
    about: str
    """What it asks, in a line."""
    files: tuple[str, ...]
    """Usual names of its data file, looked for in the data folder and one level below it."""
    source: str
    """Where the file comes from, for the message that it is missing."""
    run: Run
    read: Callable[[Path], list[dict[str, Any]]]
    beside: Callable[[Path], list[Path]] = lambda file: []
    """Further files that it reads: parts of the set, questions for shots."""
    check: Callable[[SuiteConfig], None] = lambda config: None
    """Refuses at once what running it would refuse: a package that is missing, a permission."""
    version: int = 1
    """Raised when what it measures changes: results of other versions are not compared."""
