"""The data of a run's report, from which its page, terminal tables and Markdown are rendered."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import Field, JsonValue, field_validator

from dpo_core.config import Config
from dpo_core.evaluation.compare import Comparison
from dpo_core.evaluation.decision import Decision
from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.evaluation.results import Measure
from dpo_core.judging.results import WinRate
from dpo_core.rewards.quality import RewardQuality
from dpo_core.statistics.estimates import Estimate
from expectations.report import Finding
from tasks.recipe.policies import REFERENCE
from tasks.store.facts import Origin


class RunInfo(Config):
    """The run's name, times, command and environment."""

    name: str
    recipe: str
    started_at: datetime
    finished_at: datetime
    seconds: float
    git_commit: str | None = None
    command: str
    """The command that reproduces the run from the resolved recipe in its folder."""
    folder: str = ""
    """The folder in which the run was started; relative paths of the recipe are relative to it."""
    started_by: str = ""
    """The command that the user typed; for a resumed run, the last one."""
    mlflow_run_id: str | None = None
    tracking_uri: str | None = None
    python: str
    platform: str
    hardware: str
    """One line: processors or accelerators, their number and memory."""


class StageRow(Config):
    """One stage and its artifact."""

    name: str
    state: Literal["ran", "cached", "skipped"]
    seconds: float
    kind: str | None = None
    rows: int | None = None
    parameters: int | None = None
    sha256: str | None = None
    parents: list[str] = Field(default_factory=list)
    """Digests of the artifacts that the stage read."""
    uri: str | None = None
    mlflow_run_id: str | None = None


class GateRow(Config):
    """One data set at the gate."""

    subject: str
    rows: int
    dropped: int = 0
    refused: bool = False
    docs_uri: str | None = None
    findings: list[Finding] = Field(default_factory=list)


class TrainingDescription(Config):
    """A description of the training that differs between any two runs with different settings."""

    base_model: str
    started_from: Origin | None = None
    """The origin of the base model, if it is a trained model."""
    data: str
    """Source of the rows, and the numbers of training and held-out rows."""
    rows_trained: int
    """Pairs or unpaired rows."""
    reference: str
    objective: str
    """The objective with all parameters: `simpo, beta 2, gamma_beta_ratio 0.5`."""
    training: str
    """Steps, batch size, learning rate, seed."""
    reward: str
    before: str = ""
    """The policies that are the candidate's start or reference; empty if there are none."""
    baselines: str = ""
    """The other policies; empty if there are none."""

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The block under the verdict: label and text."""
        listed = [
            ("Base model", self.base_model),
            ("Data", self.data),
            ("Reference", self.reference),
            ("Objective", self.objective),
            ("Training", self.training),
            ("Trained before", self.before),
            ("Reward", self.reward),
            ("Baselines", self.baselines),
        ]
        return [(label, text) for label, text in listed if text]


class Turn(Config):
    """One message of a conversation."""

    role: str
    content: str


class Sample(Config):
    """One prompt with each policy's answer."""

    prompt: str
    completions: dict[str, str]
    rewards: dict[str, float] = Field(default_factory=dict)
    turns: list[Turn] = Field(default_factory=list)
    """The prompt's messages; empty if it is plain text."""
    chosen: str = ""
    """The data's own chosen or desirable answer; empty if the data have none."""
    images: dict[str, list[str]] = Field(default_factory=dict, exclude_if=lambda images: not images)
    """PNG files in base64, of a model of images; the completions are their codes."""


class PolicyTable(Config):
    """The evaluation of the policies on the same prompts."""

    reward_name: str
    reward_is_true: bool
    """False: the reward is a learned proxy, which a policy can exploit."""
    n_prompts: int
    samples_per_prompt: int
    policies: list[PolicyRow]
    samples: list[Sample] = Field(default_factory=list)

    def policy(self, name: str) -> PolicyRow | None:
        """The row of a policy; None if it was not evaluated."""
        return next((row for row in self.policies if row.name == name), None)


class EvaluationDetails(PolicyTable):
    """The full result of the evaluation stage."""

    held_out_pairs: int
    accuracy_by_source: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    """Preference accuracy by policy and set of a mixture."""
    gain_over_champion: dict[str, Estimate] = Field(default_factory=dict)
    """Reward gain by policy; empty without a champion."""
    win_rates: list[WinRate] = Field(default_factory=list)
    """Win rates by the reward: every policy against the reference and, if there is one, the champion."""


class Evaluation(PolicyTable):
    """The evaluation of the policies, with the facts needed to interpret it."""

    learned_from: list[str] | None = None
    """Policies that learned from the reward that is used for evaluation; None for a learned reward."""
    max_new_tokens: int | None = None
    """Length limit of sampled answers, in tokens."""
    chosen_tokens: float | None = None
    """Median length of the data's chosen or desirable answers, in tokens."""
    chosen_ended: float | None = None
    """Share of these answers that are complete."""
    vocabulary: int | None = None
    """Size of the model's vocabulary."""


class SuiteRow(Config):
    """One model on one suite, without the items."""

    suite: str
    title: str
    policy: str
    """A policy of the run, `Champion`, or the user's name of a checkpoint."""
    items: int
    contaminated: int = 0
    """Number of items that are in the training data; 0 also if this was not checked."""
    measures: list[Measure]


class RunCost(Config):
    """Time, tokens, compute and memory that the run used."""

    seconds: float
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    tokens_trained: int = 0
    flops: float | None = None
    """Floating-point operations, summed over the stages that count them."""
    peak_memory_bytes: int | None = None
    """Peak of the training job that used most."""


class ModelRow(Config):
    """The model that the run registered."""

    name: str
    version: str | None = None
    alias: str | None = None
    uri: str
    sha256: str
    known: bool = False
    """Whether an earlier run had registered the same weights; version and aliases are then unchanged."""


class PolicyAbout(Config):
    """The description of a policy."""

    method: str
    words: str
    """Objective and settings, in words."""
    objective: str = ""
    """Name of the objective, or of a sum of objectives; empty if the method has none."""
    reward: Literal["source", "model"] | None = None
    """The reward of its samples: the recipe's source or the reward model; None if the method does not
    sample."""
    start: str
    """Its initial weights: the reference, another policy, or a model from outside the recipe."""
    reference: str
    """The reference of its KL term, named as `start`."""
    stage: str
    """The row of the stage table that trained it."""
    unusual: str = ""
    """Objective parameters that are far from their defaults, in words."""


def lineage(policies: Mapping[str, PolicyAbout], policy: str) -> list[str]:
    """A policy's ancestors: the starts and references of the policy and of its ancestors, earliest first.

    The run's reference is left out. A model from outside the recipe has its name from the recipe.
    """
    ancestors: list[str] = []

    def visit(name: str) -> None:
        about = policies.get(name)
        for model in (about.start, about.reference) if about else ():
            if model not in (REFERENCE, policy, *ancestors):
                visit(model)
                ancestors.append(model)

    visit(policy)
    return ancestors


class RunReport(Config):
    """The data that the run page, the terminal table and the Markdown artifact show."""

    run: RunInfo
    stages: list[StageRow] = Field(default_factory=list)
    gate: list[GateRow] = Field(default_factory=list)
    evaluation: Evaluation | None = None
    trained: TrainingDescription | None = None
    candidate: str
    """The policy that was registered."""
    policies: dict[str, PolicyAbout] = Field(default_factory=dict)
    """The trained policies by name, in the recipe's order."""
    reference_stage: str = ""
    """The row of the stage table that made the reference."""
    fine_tuned: bool = True
    """Whether the run fine-tuned its reference, or took the base model."""
    recipe_text: str = ""
    """The resolved recipe."""
    decision: Decision | None = None
    """Whether the model may be promoted, if the recipe requests a decision; the page's headline."""
    win_rates: list[WinRate] = Field(default_factory=list)
    suites: list[SuiteRow] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    """Comparisons with the reference and, if there is one, the champion."""
    reward_model: RewardQuality | None = None
    """Quality of the reward model on held-out pairs; None without one of the two."""
    curves: dict[str, list[dict[str, float]]] = Field(default_factory=dict)
    """Training metrics by row of the stage table: rows of `step` and metrics. Values that are not finite are
    left out, because JSON cannot represent them."""
    cost: RunCost | None = None
    model: ModelRow | None = None
    notes: dict[str, JsonValue] = Field(default_factory=dict)

    def label(self, policy: str) -> str:
        """The displayed name: DPO, DPO (simpo), or SFT (base model) where nothing was fine-tuned."""
        if policy == REFERENCE and not self.fine_tuned:
            return f"{REFERENCE} (base model)"
        about = self.policies.get(policy)
        if about is None or not about.objective or about.objective in policy.lower():
            return policy
        longer = f"{policy} ({about.objective})"
        return policy if longer in self.policies else longer

    def policy_of(self, stage: str) -> str | None:
        """The policy that a stage trained; None for other stages."""
        return next((name for name, about in self.policies.items() if about.stage == stage), None)

    def stage_label(self, stage: str) -> str:
        """The displayed name of a stage: without the policy's name if its method is unique in the run."""
        policy = self.policy_of(stage)
        if policy is None:
            return stage
        method = self.policies[policy].method
        unique = [about.method for about in self.policies.values()].count(method) == 1
        return stage.removesuffix(f" {policy}") if unique else stage

    @property
    def models(self) -> dict[str, StageRow]:
        """The rows of the stage table that made the reference and the policies, by name."""
        rows = {row.name: row for row in reversed(self.stages)}
        stages = {REFERENCE: self.reference_stage} | {n: about.stage for n, about in self.policies.items()}
        return {name: rows[stage] for name, stage in stages.items() if stage in rows}

    def lineage(self, policy: str) -> list[str]:
        """A policy's ancestors; see the function `lineage`."""
        return lineage(self.policies, policy)

    @property
    def samplers(self) -> list[str]:
        """The policies that learned from a reward on their own samples."""
        return [name for name, about in self.policies.items() if about.reward is not None]

    @field_validator("curves", mode="before")
    @classmethod
    def _finite(cls, curves: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
        return {
            stage: [
                {key: v for key, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
                for row in rows
            ]
            for stage, rows in curves.items()
        }
