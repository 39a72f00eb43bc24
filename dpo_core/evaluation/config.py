"""Settings of the evaluation of policies, of suites and of the decision to promote."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.evaluation.suite_names import module_of
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
"""Alarms of a run page that concern the candidate, its reference or its data."""


class EvaluateConfig(Config):
    """What is measured and how much of it."""

    prompts: int = Field(64, ge=2)
    """Held-out prompts, at most."""
    pairs: int = Field(256, ge=1)
    """Held-out pairs for the preference accuracy, at most; a seeded choice."""
    samples_per_prompt: int = Field(4, ge=1)
    """Completions of each policy for each prompt."""
    sampling: SamplingConfig = SamplingConfig(precision="fp32")
    """How completions are drawn; at temperature 1 and in fp32, or the KL is that of another policy."""
    precision: Precision = "bf16"
    """Precision of log-probs."""
    token_budget: int = Field(2048, ge=64)
    """Tokens in one forward pass."""
    shown: int = Field(8, ge=0)
    """Prompts shown side by side on the run page."""


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


class SuitesConfig(Config):
    """Which suites every policy is put through."""

    names: list[str] = Field(default_factory=list)
    """Suites by name (`dpo evaluate --help` lists them). Empty: none."""
    data: str | None = None
    """The folder that holds their files."""
    settings: SuiteConfig = SuiteConfig()
    """How they are run."""

    @model_validator(mode="after")
    def _can_be_run(self) -> "SuitesConfig":
        if self.names and self.data is None:
            raise ValueError("suites.data is needed: the folder that holds the files of suites.names")
        if not self.names and (self.data is not None or self.settings != SuiteConfig()):
            raise ValueError("suites.* would not be read: suites.names is empty")
        for name in self.names:
            try:
                module_of(name)
            except RecipeError as error:
                raise ValueError(str(error)) from error
        return self


class PromotionConfig(Config):
    """What a model must show before it takes the champion's place."""

    primary: str = GAIN
    """What it must be better in: `gain`, the mean reward above the champion's on the same prompts, or a
    measure of a suite as `suite/measure`, in its better direction."""
    min_gain: float = 0.0
    """The interval of that difference must lie above this."""
    min_prompts: int = Field(30, ge=2)
    """Prompts that the difference rests on, at least."""
    max_kl: float | None = Field(10.0, gt=0)
    """Nats a sequence from the reference, at most; the interval must lie below. Farther away the reward of
    every direct method has been seen to degrade while the measured one still rose (arXiv 2406.02900). Empty:
    no limit."""
    alarms: tuple[AlarmName, ...] = ("Diversity collapse", "Noise", "Cut answers")
    """Alarms about the model or its reference that refuse it: with them the measured gain says little. The
    others stand beside the decision."""
    data_gate: bool = True
    """Whether the data gate must have let the training data pass."""
    no_regression: bool = True
    """Whether it is enough that one measure of a suite is found worse to refuse."""
    safety: tuple[str, ...] = ("xstest", "advbench")
    """Suites whose regressions are a rule of their own, which `no_regression` does not switch off."""
    required: tuple[str, ...] = ()
    """Suites on which the two must have been compared."""
