"""What one alignment run found out, as data that other stages measured; nothing is computed here."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import Field, JsonValue, field_validator, model_validator

from dpo_core.config import Config
from dpo_core.evaluation.compare import Comparison
from dpo_core.evaluation.decision import Decision
from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.evaluation.results import Measure
from dpo_core.judging.results import WinRate
from dpo_core.rewards.quality import RewardQuality
from dpo_core.statistics.estimates import Estimate
from tasks.recipe.policies import REFERENCE
from tasks.reports.format import number
from tasks.reports.old_report import is_old, upgraded
from tasks.store.facts import Origin

_Part = TypeVar("_Part", bound=Config)


class RunInfo(Config):
    """Which run this is and how to get it again."""

    name: str
    recipe: str
    started_at: datetime
    finished_at: datetime
    seconds: float
    git_commit: str | None = None
    command: str
    """The command that reproduces the run: on the resolved recipe that lies beside the page."""
    folder: str = ""
    """Where relative paths of the recipe begin: the folder that the run was started in."""
    started_by: str = ""
    """The command as it was typed, of a resumed run the last one."""
    mlflow_run_id: str | None = None
    tracking_uri: str | None = None
    python: str
    platform: str
    hardware: str
    """One line: processors or accelerators, their number and memory."""


class StageRow(Config):
    """One stage and the artifact that it left."""

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


class GateFinding(Config):
    """What one rule of the data gate saw: the fields of `expectations.report.Finding`."""

    rule: str
    severity: Literal["critical", "warning", "info", "off"]
    passed: bool
    skipped: bool = False
    """Whether the rule could not be judged; the message says why."""
    count: int = 0
    rate: float | None = None
    """Share of the rows that break the rule, 0 to 1."""
    observed: float | None = None
    """The number measured, for rules on the whole set."""
    threshold: float | dict[str, float] | None = None
    """The limit applied, or several by their names in the recipe."""
    rows: list[int | str] = Field(default_factory=list)
    """The first rows that break the rule: their numbers or ids."""
    message: str = ""
    remedy: str = ""

    @property
    def measured(self) -> float | None:
        """The number to hold against the limit."""
        return self.rate if self.observed is None else self.observed

    @property
    def limit(self) -> str:
        """The limit in words."""
        if isinstance(self.threshold, dict):
            return ", ".join(f"{name} {number(value)}" for name, value in self.threshold.items()) or "–"
        return "–" if self.threshold is None else number(self.threshold)


class GateRow(Config):
    """One data set at the gate."""

    subject: str
    rows: int
    dropped: int = 0
    refused: bool = False
    docs_uri: str | None = None
    findings: list[GateFinding] = Field(default_factory=list)


class Trained(Config):
    """What was trained on what, in words, so that two runs with other settings look different."""

    base_model: str
    started_from: Origin | None = None
    """Of a base model that was trained here."""
    data: str
    """Where the rows come from, how many were trained on and how many held out."""
    rows_trained: int
    """Pairs or unpaired rows."""
    reference: str
    objective: str
    """With every parameter: `simpo, beta 2, gamma_beta_ratio 0.5`."""
    training: str
    """Steps, batch size, learning rate, seed."""
    reward: str
    before: str = ""
    """The policies that the candidate starts from or is held to; empty where there is none."""
    baselines: str = ""
    """The other policies; empty where there is none."""

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


class Sample(Config):
    """One prompt and what each policy answered."""

    prompt: str
    completions: dict[str, str]
    rewards: dict[str, float] = Field(default_factory=dict)


class PolicyTable(Config):
    """The policies side by side."""

    reward_name: str
    reward_is_true: bool
    """False: the reward is a learned proxy, which a policy can exploit."""
    n_prompts: int
    samples_per_prompt: int
    policies: list[PolicyRow]
    samples: list[Sample] = Field(default_factory=list)

    def policy(self, name: str) -> PolicyRow | None:
        """The row of that name, None where it was not evaluated."""
        return next((row for row in self.policies if row.name == name), None)


class Measured(PolicyTable):
    """All that the evaluation stage measured; what the table has no room for is shown elsewhere."""

    held_out_pairs: int
    accuracy_by_source: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    """By policy and set of a mixture: preference accuracy."""
    gain_over_champion: dict[str, Estimate] = Field(default_factory=dict)
    """By policy; empty where there is no champion."""
    win_rates: list[WinRate] = Field(default_factory=list)
    """By the reward: every policy against the reference, and against the champion where there is one."""


class Evaluation(PolicyTable):
    """The policies side by side, and what their numbers are read with."""

    learned_from: list[str] | None = None
    """Policies that learned from the reward that all are measured with; None of a learned reward, and where
    an older run did not say."""
    max_new_tokens: int | None = None
    """Where a sampled answer was cut."""
    chosen_tokens: float | None = None
    """Median length of the chosen, or desirable, answers of the data."""
    chosen_ended: float | None = None
    """Share of these that are complete."""
    vocabulary: int | None = None
    """Tokens that the model chooses from."""


class SuiteRow(Config):
    """One model on one suite, without the items."""

    suite: str
    title: str
    policy: str
    """A policy of the run, the `Champion`, or a checkpoint as the user named it."""
    items: int
    contaminated: int = 0
    """Items that stand in the training data; 0 also where that was not looked for."""
    measures: list[Measure]


class Cost(Config):
    """What the run used."""

    seconds: float
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    tokens_trained: int = 0
    flops: float | None = None
    """Floating-point operations, as each stage counted its own."""
    peak_memory_bytes: int | None = None
    """Of the training job that took most."""


class ModelRow(Config):
    """The model that the run registered."""

    name: str
    version: str | None = None
    alias: str | None = None
    uri: str
    sha256: str
    known: bool = False
    """Whether an earlier run had registered the same weights: version and aliases are as they were."""


class PolicyAbout(Config):
    """What a policy of the run is."""

    method: str
    words: str
    """Objective and settings, in words."""
    objective: str = ""
    """Name of the objective, or of the sum; empty where the method has none."""
    reward: Literal["source", "model"] | None = None
    """What scored its own samples: the known reward or the reward model; none of a method that does not
    sample."""
    start: str
    """Its initial weights: the reference, another policy, or a model from outside the recipe."""
    reference: str
    """What it is held to, named likewise."""
    stage: str
    """The row of the stage table that trained it."""
    unusual: str = ""
    """Parameters of its objective that are far from their defaults, in words."""


def lineage(policies: Mapping[str, PolicyAbout], policy: str) -> list[str]:
    """The models that a policy starts from or is held to, and those behind them, the earliest first.

    The run's reference is left out; a model from outside the recipe is named as the recipe names it.
    """
    found: list[str] = []

    def visit(name: str) -> None:
        about = policies.get(name)
        for model in (about.start, about.reference) if about else ():
            if model not in (REFERENCE, policy, *found):
                visit(model)
                found.append(model)

    visit(policy)
    return found


class RunReport(Config):
    """Everything that the run page, the terminal table and the Markdown artifact show."""

    run: RunInfo
    stages: list[StageRow] = Field(default_factory=list)
    gate: list[GateRow] = Field(default_factory=list)
    evaluation: Evaluation | None = None
    trained: Trained | None = None
    """What was trained; older reports do not say."""
    candidate: str
    """The policy that was registered."""
    policies: dict[str, PolicyAbout] = Field(default_factory=dict)
    """What was trained, by name, in the order of the recipe."""
    reference_stage: str = ""
    """The row of the stage table that made the reference."""
    recipe_text: str = ""
    """The resolved recipe, as it lies beside the page."""
    decision: Decision | None = None
    """Whether the model may take the champion's place; the page's headline where it was asked."""
    win_rates: list[WinRate] = Field(default_factory=list)
    suites: list[SuiteRow] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    """Against the reference, and against the champion where there is one."""
    reward_model: RewardQuality | None = None
    """The learned reward on held-out pairs, where one was trained and pairs were held out."""
    curves: dict[str, list[dict[str, float]]] = Field(default_factory=dict)
    """By row of the stage table: rows of `step` and metrics. Values that are not finite are dropped: JSON
    cannot hold them."""
    cost: Cost | None = None
    model: ModelRow | None = None
    notes: dict[str, JsonValue] = Field(default_factory=dict)

    def label(self, policy: str) -> str:
        """A policy as tables and sentences name it: DPO, or DPO (simpo)."""
        about = self.policies.get(policy)
        if about is None or not about.objective or about.objective in policy.lower():
            return policy
        longer = f"{policy} ({about.objective})"
        return policy if longer in self.policies else longer

    def policy_of(self, stage: str) -> str | None:
        """The policy that a row of the stage table trained; None of the other stages."""
        return next((name for name, about in self.policies.items() if about.stage == stage), None)

    def stage_label(self, stage: str) -> str:
        """A row of the stage table for people: without the policy's name where the method says enough."""
        policy = self.policy_of(stage)
        if policy is None:
            return stage
        method = self.policies[policy].method
        alone = [about.method for about in self.policies.values()].count(method) == 1
        return stage.removesuffix(f" {policy}") if alone else stage

    @property
    def models(self) -> dict[str, StageRow]:
        """The reference and the policies, each with the row of the stage table that made its model."""
        rows = {row.name: row for row in reversed(self.stages)}
        made = {REFERENCE: self.reference_stage} | {n: about.stage for n, about in self.policies.items()}
        return {name: rows[stage] for name, stage in made.items() if stage in rows}

    def lineage(self, policy: str) -> list[str]:
        """The models behind a policy; see `lineage`."""
        return lineage(self.policies, policy)

    @property
    def samplers(self) -> list[str]:
        """The policies that learned from a reward on their own samples."""
        return [name for name, about in self.policies.items() if about.reward is not None]

    def named(self) -> "RunReport":
        """The report for people: its stages under their labels, and its policies in win rates, suites,
        comparisons and samples.

        `evaluation.policies` and `policies` keep the names, by which their rows are found.
        """

        def renamed(part: _Part, *fields: str) -> _Part:
            return part.model_copy(update={field: self.label(getattr(part, field)) for field in fields})

        changed: dict[str, Any] = {
            "win_rates": [renamed(rate, "a", "b") for rate in self.win_rates],
            "suites": [renamed(row, "policy") for row in self.suites],
            "comparisons": [renamed(found, "candidate", "baseline") for found in self.comparisons],
            "stages": [row.model_copy(update={"name": self.stage_label(row.name)}) for row in self.stages],
            "policies": {
                name: about.model_copy(update={"stage": self.stage_label(about.stage)})
                for name, about in self.policies.items()
            },
            "curves": {self.stage_label(stage): rows for stage, rows in self.curves.items()},
        }
        if self.cost:
            seconds = {self.stage_label(stage): s for stage, s in self.cost.seconds_by_stage.items()}
            changed["cost"] = self.cost.model_copy(update={"seconds_by_stage": seconds})
        if self.evaluation:
            samples = [
                Sample(
                    prompt=sample.prompt,
                    completions={self.label(name): text for name, text in sample.completions.items()},
                    rewards={self.label(name): value for name, value in sample.rewards.items()},
                )
                for sample in self.evaluation.samples
            ]
            changed["evaluation"] = self.evaluation.model_copy(update={"samples": samples})
        return self.model_copy(update=changed)

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_version(cls, facts: Any) -> Any:
        return upgraded(facts) if isinstance(facts, Mapping) and is_old(facts) else facts

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
