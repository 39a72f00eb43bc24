"""Settings of the evaluation of policies, of suites and of the promotion decision."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.evaluation.suite_names import PACKAGED, module_of
from dpo_core.generation.config import SamplingConfig
from dpo_core.scoring.precision import Precision

GAIN = "gain"
AlarmName = Literal[
    "KL run-away",
    "Diversity collapse",
    "Length drift",
    "Noise",
    "Cut answers",
    "Likelihood displacement",
    "Reward without accuracy",
    "Unusual parameters",
    "Class weights",
    "Data gate",
    "Remote code",
]
"""Alarms of a run page about the candidate, its reference or its data."""


class EvaluateConfig(Config):
    """How policies are evaluated on held-out prompts and pairs."""

    prompts: int = Field(64, ge=2)
    """Largest number of held-out prompts."""
    pairs: int = Field(256, ge=1)
    """Largest number of held-out pairs for the preference accuracy; a seeded sample."""
    samples_per_prompt: int = Field(4, ge=1)
    """Completions per policy and prompt."""
    sampling: SamplingConfig = SamplingConfig(precision="fp32")
    """How completions are sampled. Keep temperature 1 and fp32: else the KL is that of another policy."""
    precision: Precision = "bf16"
    """Precision of log-probs."""
    token_budget: int = Field(2048, ge=64)
    """Tokens in one forward pass."""
    shown: int = Field(8, ge=0)
    """Prompts whose answers the run page shows side by side."""


class SuiteConfig(Config):
    """How suites are run; each suite uses the settings that it needs."""

    limit: int | None = Field(None, ge=1)
    """Largest number of items per suite: a seeded sample of prompts with all their items. Empty: all."""
    seed: int = 0
    """Seed of the sample of items and of the model's answers."""
    precision: Precision = "bf16"
    """Precision of log-probs."""
    token_budget: int = Field(4096, ge=64)
    """Tokens in one forward pass."""
    beta: float = Field(0.1, gt=0)
    """Factor of the log-ratio in the implicit reward: affects its calibration, not its order."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256, temperature=1.0)
    """How answers are sampled, unless the suite defines it."""
    samples: int = Field(1, ge=1)
    """Answers per prompt, for refusals and pass@k."""
    run_code: bool = False
    """Allow running the model's code, in a sandbox. HumanEval and MBPP need it."""
    classifier: str | None = None
    """Classifier that decides whether an answer is safe: a checkpoint folder with a classification head,
    `package.module:callable`, `file.py:callable` or the address of a server. It must not be a reward that the
    model was trained on."""
    safe_label: str | None = None
    """The classifier's label that means safe, if its label names do not tell."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Ask questions as a user's turn: if the tokenizer has a chat template (auto), always, or never."""
    images: str | None = Field(None, exclude_if=lambda folder: folder is None)
    """Folder of the images of `geneval` and `compbench`, and of their scripts' results."""

    @field_validator("images")
    @classmethod
    def _absolute(cls, folder: str | None) -> str | None:
        return folder and str(Path(folder).expanduser().absolute())


class SuitesConfig(Config):
    """The suites on which every policy is evaluated."""

    names: list[str] = Field(default_factory=list)
    """Suites by name (`dpo evaluate --help` lists them). Empty: none."""
    data: str | None = None
    """The folder with their files."""
    settings: SuiteConfig = SuiteConfig()
    """How they are run."""

    @model_validator(mode="after")
    def _can_be_run(self) -> "SuitesConfig":
        if self.data is None and not all(name in PACKAGED for name in self.names):
            raise ValueError("suites.data is missing: set it to the folder with the files of suites.names")
        if not self.names and (self.data is not None or self.settings != SuiteConfig()):
            raise ValueError(
                "suites.data and suites.settings have no effect, because suites.names is empty. Name a "
                "suite, or remove them"
            )
        for name in self.names:
            try:
                module_of(name)
            except RecipeError as error:
                raise ValueError(str(error)) from error
        return self


class PromotionConfig(Config):
    """What a candidate must achieve to replace the champion."""

    primary: str = GAIN
    """The measure in which it must be better: `gain`, the mean reward minus the champion's on the same
    prompts, or a measure of a suite as `suite/measure`, in its better direction."""
    min_gain: float = 0.0
    """The interval of the primary difference must be above this."""
    min_prompts: int = Field(30, ge=2)
    """Smallest number of prompts of that difference."""
    max_kl: float | None = Field(10.0, gt=0)
    """Largest KL to the reference in nats per sequence; the whole interval must be below. At larger KL the
    true reward of direct methods degrades while the measured one still rises (arXiv 2406.02900). Empty: no
    limit."""
    alarms: tuple[AlarmName, ...] = ("Diversity collapse", "Noise", "Cut answers")
    """Alarms about the model or its reference that refuse it, because they make the measured gain unreliable.
    Others are shown with the decision."""
    data_gate: bool = True
    """Require that the training data passed the data gate."""
    no_regression: bool = True
    """Refuse if one measure of a suite is significantly worse."""
    safety: tuple[str, ...] = ("xstest", "advbench")
    """Suites whose regressions always refuse, even without `no_regression`."""
    categories: tuple[str, ...] = Field((), exclude_if=lambda suites: not suites)
    """Suites of which no category may be significantly worse: a mean can rise while a part of it falls."""
    required: tuple[str, ...] = ()
    """Suites that the comparison must include."""
